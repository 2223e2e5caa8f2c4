"""Starts harness processes by forking them from servers that have imported the harness and the engine.

One server (`fork_server.py`) per harness model and environment: what an import reads from the environment is never
another model's. A server is started for the first process that needs it, and ended by `ForkServers.close`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from compare.run.processes.harness_process import Child, Start, SupervisedCommand, harness_environment

MODULE = "compare.run.processes.fork_server"
_KILLED = 137  # 128 + SIGKILL
_GRACE = 1.0  # seconds


class ForkServers:
    """The servers of one run, for commands that are ``sys.executable -m MODULE ARGUMENTS``."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, frozenset[tuple[str, str]]], _Server] = {}

    def start(self, model: str) -> Start | None:
        """What starts processes of `lm_eval --model MODEL`; None on systems where forking is unsafe."""
        if sys.platform != "linux":
            return None

        def start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> Child:
            module, arguments = command[2], command[3:]
            key = model, frozenset(environment.items())
            server = self._servers.get(key)
            if server is None or not server.alive:
                server = self._servers[key] = _Server(module, model, environment)

            def anew() -> Child:
                with Path(log.name).open("ab") as stream:
                    return SupervisedCommand(command, stream, environment)

            return server.start(arguments, log, anew)

        return start

    def close(self, at_once: bool = False) -> None:
        """End the servers; processes that they have started run on, and others do not start. Idempotent.

        at_once: do not wait for servers that have nothing to do to end by themselves.
        """
        for server in self._servers.values():
            server.close(at_once)
        self._servers.clear()


class _Server:
    """A running server for `lm_eval --model MODEL`. module: what its processes run."""

    def __init__(self, module: str, model: str, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ended: list[int] = []  # supervisors that have ended since the last request
        with theirs, tempfile.TemporaryFile() as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", MODULE, module, model],
                stdin=theirs.fileno(),
                stdout=output,  # what the imports print, for the log of each process
                stderr=subprocess.STDOUT,
                env=harness_environment(environment),
                start_new_session=True,  # no Ctrl-C from the terminal
            )

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def start(self, arguments: Sequence[str], log: IO[bytes], otherwise: Callable[[], Child]) -> Child:
        """Start the module with `arguments`. otherwise: starts it in another way, should this server fail."""
        watch, client = os.pipe()
        report, reported = os.pipe()
        request = json.dumps({"arguments": list(arguments), "ended": self._ended}).encode()
        try:
            socket.send_fds(self._socket, [request], [log.fileno(), watch, reported])
        except OSError:  # it was killed, or the arguments are longer than a datagram
            os.close(client)
            os.close(report)
            return otherwise()
        finally:
            os.close(watch)
            os.close(reported)
        self._ended = []
        return _ForkedProcess(client, report, otherwise, self._note_end)

    def close(self, at_once: bool) -> None:
        self._socket.close()
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_GRACE)
        self._popen.kill()
        self._popen.wait()

    def _note_end(self, pid: int) -> None:
        self._ended.append(pid)


class _ForkedProcess:
    """A harness process below a forked supervisor; one started in another way if the server ends before it forks.

    client: a pipe whose end tells the supervisor that we are gone. report: a pipe with the supervisor's pid, and at the
    end the exit code. otherwise: starts the process in another way. on_end: receives the supervisor's pid when it has
    ended and its group was killed.
    """

    def __init__(self, client: int, report: int, otherwise: Callable[[], Child], on_end: Callable[[int], None]) -> None:
        os.set_blocking(report, False)
        self._client: int | None = client
        self._report: int | None = report
        self._reported = b""
        self._otherwise, self._on_end = otherwise, on_end
        self._other: Child | None = None

    @property
    def pid(self) -> int | None:
        if self._other is not None:
            return self._other.pid
        self._read()
        lines = self._lines()
        return lines[0] if lines else None

    def poll(self) -> int | None:
        if self._other is None:
            self._read()
            if self._report is not None:
                return None
            if lines := self._lines():
                return lines[1] if len(lines) > 1 else _KILLED
            if self._client is None:  # closed before it was started
                return _KILLED
            try:
                self._other = self._otherwise()
            except OSError:  # the log cannot be written
                return 1
        return self._other.poll()

    def wait(self, seconds: float | None) -> None:
        if self._other is not None:
            self._other.wait(seconds)
        while self._report is not None and select.select([self._report], [], [], seconds)[0]:
            self._read()

    def close(self) -> None:
        if self._other is not None:
            self._other.close()
        if self._client is not None:
            os.close(self._client)
            self._client = None
            if self._report is None and (lines := self._lines()):
                self._on_end(lines[0])

    def _lines(self) -> list[int]:
        """The supervisor's pid and the exit code, as far as they are reported."""
        return [int(line) for line in self._reported.split(b"\n")[:-1]]

    def _read(self) -> None:
        """Read what was reported; at the end of the pipe, close it."""
        with contextlib.suppress(BlockingIOError):
            while self._report is not None:
                data = os.read(self._report, 64)
                self._reported += data
                if not data:
                    os.close(self._report)
                    self._report = None
