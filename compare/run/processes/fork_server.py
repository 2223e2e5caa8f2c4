"""Forks harness processes that have their imports behind them; touches no GPU and runs no model itself.

``python -m compare.run.processes.fork_server MODULE MODEL``: imports the harness and the class of its model MODEL once,
then forks one process per request, which runs MODULE as ``python -m MODULE ARGUMENTS`` would: in a process group of its
own, below a supervisor (`supervisor.py`), with the log as its output. Standard input is a socket of datagrams:

======================================================  ================================================================
request (JSON)                                          ``{"arguments": [...], "ended": [pid, …]}``: a start, and the
                                                        supervisors that have ended since the last request
descriptors sent with it                                the log; a pipe that closes when the client is gone; a pipe that
                                                        takes the supervisor's pid, and at the end the exit code, a line
                                                        each
======================================================  ================================================================

A process in which the imports must not be kept (an import failed, a GPU driver is open, threads run) starts Python
anew, as without this server; its log says why. The server ends with its client.

On a machine with a GPU, importing an engine may open its driver (vLLM 0.33 does), and then nothing can be forked any
more. So there the server imports the harness alone, and the first process the engine. If that opens nothing, the server
imports it too. If it does, the log says so, and every process is forked with the harness and imports the engine itself.

Only names of modules lead from here to the harness: importing this file imports the standard library alone.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare.errors import first_line
from compare.run.processes import supervisor

MAX_REQUEST = 1 << 20  # bytes

# What the harness (0.4.13) imports once it runs, below its package; and the module with the classes of its models
_HARNESS = ("evaluator", "loggers", "models")
_REGISTRY = "api.registry"
# What lm_eval imports with every model where it is installed: to set seeds, to describe the machine, to print the table
_INSTALLED = {"lm_eval": ("torch.utils.collect_env", "transformers", "pytablewriter")}
# An attribute of a model's class: modules that are imported only when a model is loaded or a task is made
_LATE_IMPORTS = "late_imports"
# Open in a process that has initialized CUDA or ROCm; a fork of it cannot use the GPU
_DRIVERS = ("/dev/nvidia-uvm", "/dev/kfd")
# There on a machine with a GPU; the first of the above may appear only when CUDA is initialized
_GPUS = ("/dev/nvidiactl", *_DRIVERS)
_NO_OBSTACLE = "none"  # what the first process reports of an engine that the server can import


def main() -> None:
    """Serve requests. In a forked harness process: run the module, and end as Python ends."""
    module, model = sys.argv[1:]
    supervisor.end_with_parent()
    supervisor.ignore_signals()
    server = _Server(module, model)
    arguments, trial = server.serve()
    # from here on in the forked process
    obstacle, failed = server.obstacle, bool(server.obstacle)
    if trial is not None:
        obstacle, failed = _import_engine(module, model)
        os.write(trial, (obstacle or _NO_OBSTACLE).encode())
        os.close(trial)
    if failed:
        print(f"compare: nothing imported beforehand: {obstacle}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    if obstacle:
        print(f"compare: each model imports the engine itself: {obstacle}", file=sys.stderr, flush=True)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # sets sys.argv[0]


def _import_harness(harness: str) -> tuple[str, bool]:
    """Import the harness. Returns why processes must not be forked from here, or ``""``; and whether it failed."""

    def modules() -> None:
        for name in _HARNESS:
            importlib.import_module(f"{harness}.{name}")
        for name in _INSTALLED.get(harness, ()):
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)

    return _obstacle(modules)


def _import_engine(harness: str, model: str) -> tuple[str, bool]:
    """Import the engine of `model`. Returns why processes must not be forked from here; and whether it failed."""

    def modules() -> None:
        class_: Any = importlib.import_module(f"{harness}.{_REGISTRY}").get_model(model)
        for name in getattr(class_, _LATE_IMPORTS, ()):
            importlib.import_module(name)

    return _obstacle(modules)


def _obstacle(imports: Callable[[], None]) -> tuple[str, bool]:
    try:
        imports()
    except BaseException as error:  # whatever it is, it happens again in the process that is meant to report it
        return f"{type(error).__name__}: {first_line(error)}", True
    if threading.active_count() > 1:
        return "imports have started threads", False
    opened = [driver for driver in _DRIVERS if driver in _open_files()]
    return (f"imports have opened {opened[0]}" if opened else ""), False


def _open_files() -> set[str]:
    files = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor, closed by now
            files.add(str(link.readlink()))
    return files


class _Server:
    """Imports what it may, and forks processes.

    obstacle: why no process must be forked with the imports, or ``""``.
    """

    def __init__(self, harness: str, model: str) -> None:
        self._harness, self._model = harness, model
        self._engine_is_tried = True  # whether it is known where the engine has to be imported
        self._trial: int | None = None  # a pipe with what the first process reports of the engine
        self.obstacle, _ = _import_harness(harness)
        if not self.obstacle:
            if any(Path(device).exists() for device in _GPUS):
                self._engine_is_tried = False
            else:
                self.obstacle, _ = _import_engine(harness, model)
        gc.freeze()  # the collector of a forked process would otherwise write to all of the shared pages

    def serve(self) -> tuple[list[str], int | None]:
        """Fork one supervisor per request, and in each one harness process, where this returns.

        Returns the arguments; and for a process that is to try the engine, the pipe to write its obstacle to.
        """
        control = socket.socket(fileno=os.dup(0))
        while True:
            if self._trial is not None and self._trial in select.select([control.fileno(), self._trial], [], [])[0]:
                self._read_trial(self._trial)
                continue
            data, descriptors = _receive(control)
            if not data:
                _reap()
                os._exit(0)  # without the exit handlers, which belong to the harness processes
            request = json.loads(data)
            for pid in request["ended"]:
                os.waitpid(pid, 0)  # until here its pid, which is its group's, was not given to another process
            trial = None
            if not self._engine_is_tried and self._trial is None:
                self._trial, trial = os.pipe()
            if os.fork() == 0:
                control.close()
                log, client, report = descriptors
                _supervise(log, client, report, trial, b"" if self.obstacle else _output())
                return list(request["arguments"]), trial
            for descriptor in (*descriptors, *([] if trial is None else [trial])):
                os.close(descriptor)

    def _read_trial(self, trial: int) -> None:
        """Import the engine if the first process has found no obstacle; where that process ended, have another try."""
        reported = os.read(trial, select.PIPE_BUF).decode()
        os.close(trial)
        self._trial = None
        self._engine_is_tried = bool(reported)
        if reported == _NO_OBSTACLE:
            self.obstacle, _ = _import_engine(self._harness, self._model)
            gc.freeze()


def _reap() -> None:
    """Collect the supervisors that have ended: their CPU time is then part of this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """One request and the descriptors sent with it."""
    descriptors = array.array("i")
    data, ancillary, _, _ = control.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(3 * descriptors.itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content)
    return data, list(descriptors)


def _output() -> bytes:
    """What the imports have printed: standard output is a file."""
    return os.pread(1, os.fstat(1).st_size, 0)


def _supervise(log: int, client: int, report: int, trial: int | None, output: bytes) -> None:
    """Fork the harness process, where this returns. Here, wait for it, report its exit code and end.

    trial: a pipe that only the harness process keeps.
    """
    os.setsid()
    with contextlib.suppress(OSError):  # a full disk: the harness will say so
        os.write(log, output)
    for descriptor, standard in ((client, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)
    os.close(client)
    os.close(log)
    os.write(report, f"{os.getpid()}\n".encode())
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(report)
        _prepare(parent)
        return
    if trial is not None:
        os.close(trial)
    code = 1
    try:
        code = supervisor.supervise(lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.write(report, f"{code}\n".encode())
    finally:
        os._exit(code)


def _prepare(parent: int) -> None:
    """In the harness process: die with the supervisor, handle signals as Python does, read from nothing."""
    supervisor.end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    main()
