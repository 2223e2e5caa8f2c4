"""`HarnessProcess`: one process of the harness, followed through its log and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from compare.run.processes.progress import BAR, Progress, duration, parse_progress

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
HARNESS = (sys.executable, "-m", "lm_eval")

_READ = 1 << 16  # bytes of the log's end that are kept


class Child(Protocol):
    """A started process group. Its leader, the supervisor, ends when the command ends or `close` was called."""

    @property
    def pid(self) -> int | None:
        """The leader's pid, which is the group's; None while it is starting."""

    def poll(self) -> int | None:
        """The exit code once the leader has ended, else None."""

    def wait(self, seconds: float | None) -> None:
        """Wait for the leader's end, `seconds` at most."""

    def close(self) -> None:
        """Let the leader end the group, if it still runs. Idempotent."""


# Starts a command: its words, its log, and the environment variables that are added for it
Start = Callable[[Sequence[str], IO[bytes], Mapping[str, str]], Child]


def harness_environment(additional: Mapping[str, str]) -> dict[str, str]:
    """The environment of a harness process whose log is followed."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5", **additional}


class SupervisedCommand:
    """A command started by a supervisor of its own."""

    def __init__(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
        """Start `command`, with its output in `log`. environment: additional variables."""
        self._popen = subprocess.Popen(
            [sys.executable, "-E", "-S", str(_SUPERVISOR), *command],
            stdin=subprocess.PIPE,  # nothing is written to it: its end tells the supervisor that we are gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=harness_environment(environment),
            start_new_session=True,
        )
        self._pipe: IO[bytes] | None = self._popen.stdin

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        code = self._popen.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, seconds: float | None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


class HarnessProcess:
    """A running command whose output goes to `log`. It ends, with all its children, when this process does."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], start: Start = SupervisedCommand
    ) -> None:
        """Start `command`. environment: additional variables. Raises OSError if the log cannot be written."""
        self.log = log
        self._read_to = 0
        self.progress: Progress | None = None
        self._tail = ""
        self.started = time.monotonic()
        with log.open("wb") as stream:
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self._child = start(command, stream, environment)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def state(self, eval_len: int | None = None) -> str:
        """The progress, in words for the user. eval_len: tokens per window."""
        if self.progress is None:
            return f"loading, {duration(self.elapsed)}"
        return self.progress.words(eval_len)

    def poll(self) -> int | None:
        """The exit code once it has ended (128 + signal for a killed one), else None; reads the new part of the log."""
        code = self._child.poll()
        self._read()
        if code is not None:
            self._signal(signal.SIGKILL)  # children that the command may have left behind
            self._child.close()
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the command and its children."""
        self._signal(signal.SIGTERM)

    def stop(self, grace: float = 5.0) -> None:
        """End it with SIGTERM, and with SIGKILL after `grace` seconds."""
        try:
            self.terminate()
            self._child.wait(grace)  # the leader waits for its command, so its end is the end of both
        finally:
            self._signal(signal.SIGKILL)
            self._child.close()
            self._child.wait(None)

    def _signal(self, number: int) -> None:
        pid = self._child.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)

    def _read(self) -> None:
        """Update the progress from the new part of the log."""
        try:
            with self.log.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                if size == self._read_to:
                    return
                stream.seek(max(self._read_to, size - _READ))
                fresh = stream.read(_READ).decode("utf-8", "replace")
        except OSError:
            return
        self._read_to = size
        self._tail = (self._tail + fresh)[-_READ:]
        bar = parse_progress(self._tail[-8192:])
        if bar and (bar.scoring or self.progress is None or not self.progress.scoring):
            self.progress = bar


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The last lines of the log, without progress bars and empty lines; empty where it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _READ))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("$ ") and not BAR.search(line)][-count:]
