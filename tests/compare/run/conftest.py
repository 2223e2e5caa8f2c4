"""A workshop for `compare run`: model folders, specs, and a stub in place of the harness."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from compare.cli import main

STUB = Path(__file__).with_name("stub_harness.py")
HARNESS = f"{sys.executable} -S {STUB}"


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """A process that does not start or end fails its test, instead of holding up all of them."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("the test took more than three minutes")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def usual_signals() -> None:
    """In a child: signals as a terminal's shell leaves them. Tests that run under nohup inherit them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Workshop:
    """Models `a`, `b`, … with 4, 5, … bits; a models spec and a data spec; runs of the command."""

    def __init__(self, root: Path, names: str = "abc") -> None:
        self.root = root
        self.results = root / "results"
        self.calls_file = root / "calls"
        self.fifo = root / "alive"
        os.mkfifo(self.fifo)
        for i, name in enumerate(names):
            self.model(name, bits=4.0 + i)
        self.entries: list[dict[str, Any]] = [
            {"load_fn": "vllm", "fwd_fn": "vllm", "label": f"Model {name}", "model_dir": f"models/{name}"}
            for name in names
        ]
        self.data: dict[str, Any] = {
            "tokenize_fn": "transformers",
            "tokenizer_dir": "models/a",
            "dataset": "wiki2",
            "eval_stride": 512,
            "eval_len": 2048,
            "max_rows": 20,
        }
        self.write()

    def model(self, name: str, bits: float = 4.0, weights: bytes = b"") -> Path:
        folder = self.root / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "bits").write_text(str(bits))
        write_safetensors(folder / "model.safetensors", weights or name.encode() * 4096)
        return folder

    def write(self) -> None:
        (self.root / "models.json").write_text(json.dumps(self.entries))
        (self.root / "data.json").write_text(json.dumps(self.data))

    def mark(self, name: str, how: str, text: str = "") -> Path:
        file = self.root / "models" / name / how
        file.write_text(text)
        return file

    def arguments(self, *more: str) -> list[str]:
        specs = ["-d", str(self.root / "data.json"), "-m", str(self.root / "models.json")]
        return ["run", *specs, "--results", str(self.results), "--harness", HARNESS, *more]

    def run(self, *more: str) -> int:
        """The command in this process; its exit code."""
        os.environ["STUB_CALLS"], os.environ["STUB_FIFO"] = str(self.calls_file), str(self.fifo)
        return main(self.arguments(*more))

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """The command as a process of its own."""
        env = {**os.environ, "STUB_CALLS": str(self.calls_file), "STUB_FIFO": str(self.fifo)}
        command = [sys.executable, "-m", "compare", *self.arguments(*more)]
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": usual_signals}
        options = usual | options
        return subprocess.Popen(command, env=env, **options)

    def calls(self) -> list[str]:
        """Models that the harness was called for since the last time, in order."""
        return [call["model"] for call in self.told() if "model" in call]

    def told(self) -> list[dict[str, Any]]:
        """What the stub told of its runs since the last time: each one's arguments, and its end if it came so far."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def labels(self) -> list[str]:
        """Labels in the table of the results folder."""
        from compare.results.reading import read_results

        reading = read_results([self.results])
        assert not reading.problems
        return sorted(record.label for record in reading.records)


def write_safetensors(file: Path, data: bytes) -> None:
    """One tensor of bytes: a valid file, whose header depends on the size of `data` only."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ray: starts a local Ray cluster of several nodes (half a minute)")
