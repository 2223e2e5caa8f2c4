"""`HarnessProcess`: one process of the harness, followed through its log and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from compare.run.processes.progress import BAR, Progress, duration, parse_progress

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
HARNESS = (sys.executable, "-m", "lm_eval")

_READ = 1 << 16  # bytes of the log's end that are kept


class HarnessProcess:
    """A running command whose output goes to `log`. It ends, with all its children, when this process does."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start `command`. environment: additional variables. Raises OSError if the log cannot be written."""
        self.log = log
        self._read_to = 0
        self.progress: Progress | None = None
        self._tail = ""
        self.started = time.monotonic()
        with log.open("wb") as stream:
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self._popen = subprocess.Popen(
                [sys.executable, "-E", "-S", str(_SUPERVISOR), *command],
                stdin=subprocess.PIPE,  # nothing is written to it: its end tells the supervisor that we are gone
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5", **environment},
                start_new_session=True,
            )
        self._pipe: IO[bytes] | None = self._popen.stdin

    @property
    def pid(self) -> int:
        return self._popen.pid

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
        code = self._popen.poll()
        self._read()
        if code is None:
            return None
        self._signal(signal.SIGKILL)  # children that the command may have left behind
        self._close()
        return 128 - code if code < 0 else code

    def terminate(self) -> None:
        """Send SIGTERM to the command and its children."""
        self._signal(signal.SIGTERM)

    def stop(self, grace: float = 5.0) -> None:
        """End it with SIGTERM, and with SIGKILL after `grace` seconds."""
        self.terminate()
        try:
            # the supervisor waits for its command, so its end is the end of both
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._popen.wait()
            self._close()

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

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
