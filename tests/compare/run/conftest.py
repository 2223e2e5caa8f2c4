"""Fixtures for `compare run`: model folders, specs, and a stub in place of the harness."""

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
    """Fail a test whose process does not start or end, instead of blocking all tests."""

    def time_out(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("the test took more than three minutes")

    previous = signal.signal(signal.SIGALRM, time_out)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def default_signals() -> None:
    """In a child: handle signals as usual. Tests that run under nohup inherit them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Workshop:
    """Models `a`, `b`, … with 4, 5, … bits per weight; a model spec and a data spec; and calls of the command."""

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
        """Write the specs, after `entries` or `data` has changed."""
        (self.root / "models.json").write_text(json.dumps(self.entries))
        (self.root / "data.json").write_text(json.dumps(self.data))

    def mark(self, name: str, how: str, text: str = "") -> Path:
        """Let the stub's run of a model go as `stub_harness` describes for the file `how`."""
        file = self.root / "models" / name / how
        file.write_text(text)
        return file

    def arguments(self, *more: str) -> list[str]:
        specs = ["-d", str(self.root / "data.json"), "-m", str(self.root / "models.json")]
        return ["run", *specs, "--results", str(self.results), "--harness", HARNESS, *more]

    def run(self, *more: str) -> int:
        """Run the command in this process and return its exit code."""
        os.environ["STUB_CALLS"], os.environ["STUB_FIFO"] = str(self.calls_file), str(self.fifo)
        return main(self.arguments(*more))

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """Start the command as a process of its own."""
        env = {**os.environ, "STUB_CALLS": str(self.calls_file), "STUB_FIFO": str(self.fifo)}
        command = [sys.executable, "-m", "compare", *self.arguments(*more)]
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
        options = usual | options
        return subprocess.Popen(command, env=env, **options)

    def calls(self) -> list[str]:
        """Models that the harness was called for since the last call of this, in order."""
        return [call["model"] for call in self.stub_events() if "model" in call]

    def stub_events(self) -> list[dict[str, Any]]:
        """Arguments of each run of the stub, and the ends of complete ones, since the last call of this."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def wait_for_hanging_stub(self) -> tuple[int, int]:
        """Wait for a stub marked `hang`. Returns its pid, and a descriptor that reaches its end with the stub's end."""
        alive = os.open(self.fifo, os.O_RDONLY)
        return read_pid(alive), alive

    def labels(self) -> list[str]:
        """Labels in the table of the results folder."""
        from compare.results.reading import read_results

        reading = read_results([self.results])
        assert not reading.problems
        return sorted(record.label for record in reading.records)


def read_pid(alive: int) -> int:
    """The pid that a hanging stub writes into the pipe."""
    pid = b""
    while not pid.endswith(b"\n"):
        pid += os.read(alive, 1)
    return int(pid)


def wait_for_end(alive: int) -> None:
    """Return once no process holds the other end of the pipe."""
    assert os.read(alive, 1) == b""
    os.close(alive)


def parent_of(pid: int) -> int:
    """The pid of a process' parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def write_safetensors(file: Path, data: bytes) -> None:
    """Write a valid file with one tensor of bytes; its header depends only on the size of `data`."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub harness answers within milliseconds; five looks a second would take most of these tests' time."""
    monkeypatch.setattr("compare.run.processes.local_pool.POLL_SECONDS", 0.01)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ray: starts a local Ray cluster of several nodes (half a minute)")
