"""Fixtures for `compare run`: model folders, specs, and a stub in place of the harness."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from compare.cli import main
from compare.run.processes import local_pool
from tests.compare.run import forked_compare
from tests.conftest import ROOT

STUB = Path(__file__).with_name("stub_harness.py")
HARNESS = f"{sys.executable} -S {STUB}"


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """Fail a test whose process does not start or end, instead of blocking all tests."""

    def time_out(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("the test took more than three minutes")  # not an OSError, which the code handles

    previous = signal.signal(signal.SIGALRM, time_out)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def default_signals() -> None:
    """In a child: handle signals as Python does. Tests that run under nohup inherit them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _end_as(work: Callable[[], int]) -> None:
    """In a child of `subprocess.Popen`, before it executes a program: do `work` instead, and end with its exit code."""
    code = 1
    try:
        os.closerange(3, 4096)
        # pytest has replaced these; Popen returns in the parent as its own pipe is closed now
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # noqa: PTH123, SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Workshop:
    """Models `a`, `b`, … with 4, 5, … bits per weight; a model spec and a data spec; and calls of the command.

    forked: the stub is forked from a server, as `lm_eval` is by default; else a command of its own, as with --harness.
    """

    def __init__(self, root: Path, names: str = "abc", forked: bool = True) -> None:
        self.root, self.forked = root, forked
        self.results = root / "results"
        self.calls_file, self.imports_file = root / "calls", root / "imports"
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
        harness = [] if self.forked else ["--harness", HARNESS]
        return ["run", *specs, "--results", str(self.results), *harness, *more]

    def run(self, *more: str) -> int:
        """Run the command in this process and return its exit code."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment().items():
                patch.setenv(name, value)
            patch.setattr(local_pool, "HARNESS", forked_compare.HARNESS)
            return main(self.arguments(*more))

    def environment(self) -> dict[str, str]:
        """Variables that the stub reads, and the path to its package."""
        files = {"STUB_CALLS": self.calls_file, "STUB_IMPORTS": self.imports_file, "STUB_FIFO": self.fifo}
        return {**{name: str(file) for name, file in files.items()}, "PYTHONPATH": str(ROOT)}

    def servers(self) -> list[int]:
        """Pids of the processes that have imported the stub, in order."""
        return [int(line) for line in self.imports_file.read_text().splitlines()] if self.imports_file.exists() else []

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """Run the command in a fork of this process, which has imported it already."""
        prepare = options.pop("preexec_fn", default_signals)

        def work() -> int:
            prepare()
            return self.run(*more)

        return self._start(["compare"], preexec_fn=lambda: _end_as(work), **options)

    def start_command(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """Start the command as the user does: a Python of its own."""
        module = "tests.compare.run.forked_compare" if self.forked else "compare"
        command = [sys.executable, "-m", module, *self.arguments(*more)]
        return self._start(command, env={**os.environ, **self.environment()}, **options)

    def _start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
        return subprocess.Popen(command, **(usual | options))

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


def whole_seconds(text: str) -> str:
    """Text in which everything took "0 s": the machine may be busy."""
    return re.sub(r"\b\d+ s\b", "0 s", text)


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
