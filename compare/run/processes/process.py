"""One process of the harness: started, watched through its log, ended with everything it started."""

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

LIFELINE = Path(__file__).with_name("lifeline.py")
HARNESS = (sys.executable, "-m", "lm_eval")

_READ = 1 << 16


class Process:
    """A running command whose output goes to `log`. It, and all it starts, ends when this process does."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Raises OSError where the log cannot be written."""
        self.log = log
        self._read_to = 0
        self.progress: Progress | None = None
        self._tail = ""
        self.started = time.monotonic()
        with log.open("wb") as stream:
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self._popen = subprocess.Popen(
                [sys.executable, "-E", "-S", str(LIFELINE), *command],
                stdin=subprocess.PIPE,  # the lifeline; nothing is ever written to it
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5", **environment},
                start_new_session=True,
            )
        self._lifeline: IO[bytes] | None = self._popen.stdin

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def state(self, eval_len: int | None = None) -> str:
        """What it is at, in words for the user."""
        if self.progress is None:
            return f"loading, {duration(self.elapsed)}"
        return self.progress.words(eval_len)

    def poll(self) -> int | None:
        """The exit code (128 + signal for a killed one) once it has ended; reads what the log has gained."""
        code = self._popen.poll()
        self._read()
        if code is None:
            return None
        self._signal(signal.SIGKILL)  # what the command may have left behind
        self._close()
        return 128 - code if code < 0 else code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def stop(self, grace: float = 5.0) -> None:
        """End it: a polite signal, and the final one after `grace` seconds."""
        self.terminate()
        try:
            # the lifeline itself waits for its command, so its end is the end of both
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._popen.wait()
            self._close()

    def _close(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def _read(self) -> None:
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
        found = parse_progress(self._tail[-8192:])
        if found and (found.scoring or self.progress is None or not self.progress.scoring):
            self.progress = found


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The log's last lines that say something: no progress bars, no empty ones."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _READ))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("$ ") and not BAR.search(line)][-count:]
