"""Runs a command, and ends it with all its children when the parent process is gone.

``python supervisor.py COMMAND …``: standard input is a pipe whose other end the parent holds. However the parent ends,
kill -9 included, the pipe closes, and this process ends its whole process group: no engine keeps a GPU for a result
that is not collected. If this process itself is killed, Linux kills the command. Standard library only: this
interpreter starts without site-packages. `fork_server.py` supervises its processes with the same functions.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_parent_gone = threading.Event()

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> int:
    """Run the command and return its exit code; 128 + signal for a killed one, 127 where it cannot be started."""
    ignore_signals()
    try:
        # preexec_fn is safe before the second thread starts
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_prepare)
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127
    return supervise(child.wait)


def ignore_signals() -> None:
    """Outlive SIGINT and SIGTERM: the command gets them too, and this process waits for its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def supervise(wait: Callable[[], int]) -> int:
    """Return the exit code of a started command, 128 + signal for a killed one; end it when the parent is gone.

    wait: waits for the command and returns its exit code, negative for a signal.
    """
    threading.Thread(target=_watch, daemon=True).start()
    code = wait()
    if _parent_gone.is_set():
        time.sleep(2 * GRACE)  # SIGKILL ends this sleep, and the command's children
    return 128 - code if code < 0 else code


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare() -> None:
    """In the child: die with this process (Linux), and handle signals as usual."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch() -> None:
    """Wait until the pipe closes, then end the process group."""
    while os.read(0, 1):
        pass
    _parent_gone.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
