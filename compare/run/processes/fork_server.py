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
import signal
import socket
import sys
import threading
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


def main() -> None:
    """Serve requests. In a forked harness process: run the module, and end as Python ends."""
    module, model = sys.argv[1:]
    supervisor.end_with_parent()
    supervisor.ignore_signals()
    obstacle = _import(module, model)
    gc.freeze()  # the collector of a forked process would otherwise write to all of the shared pages
    arguments = _serve(obstacle)
    # from here on in the forked process
    if obstacle:
        print(f"compare: nothing imported beforehand: {obstacle}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # sets sys.argv[0]


def _import(harness: str, model: str) -> str:
    """Import the harness and the engine of `model`. Returns why processes must not be forked from here, or ``""``."""
    try:
        for name in _HARNESS:
            importlib.import_module(f"{harness}.{name}")
        class_: Any = importlib.import_module(f"{harness}.{_REGISTRY}").get_model(model)
        installed = [name for name in _INSTALLED.get(harness, ()) if importlib.util.find_spec(name.partition(".")[0])]
        for name in (*installed, *getattr(class_, _LATE_IMPORTS, ())):
            importlib.import_module(name)
    except BaseException as error:  # whatever it is, it happens again in the process that is meant to report it
        return f"{type(error).__name__}: {first_line(error)}"
    if threading.active_count() > 1:
        return "imports have started threads"
    opened = [driver for driver in _DRIVERS if driver in _open_files()]
    return f"imports have opened {opened[0]}" if opened else ""


def _open_files() -> set[str]:
    files = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor, closed by now
            files.add(str(link.readlink()))
    return files


def _serve(obstacle: str) -> list[str]:
    """Fork one supervisor per request, and in each one harness process, where this returns the arguments."""
    control = socket.socket(fileno=os.dup(0))
    while True:
        data, descriptors = _receive(control)
        if not data:
            _reap()
            os._exit(0)  # without the exit handlers, which belong to the harness processes
        request = json.loads(data)
        for pid in request["ended"]:
            os.waitpid(pid, 0)  # until here its pid, which is its group's, was not given to another process
        if os.fork() == 0:
            control.close()
            log, client, report = descriptors
            _supervise(log, client, report, b"" if obstacle else _output())
            return list(request["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)


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


def _supervise(log: int, client: int, report: int, output: bytes) -> None:
    """Fork the harness process, where this returns. Here, wait for it, report its exit code and end."""
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
