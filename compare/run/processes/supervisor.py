"""Runs a command, and ends it with all its children when the parent process is gone.

``python supervisor.py COMMAND …``: standard input is a pipe whose other end the parent holds. However the parent ends,
kill -9 included, the pipe closes, and this process ends its whole process group: no engine keeps a GPU for a result
that is not collected. If this process itself is killed, Linux kills the command. Standard library only: this
interpreter starts without site-packages.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_parent_gone = threading.Event()

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> int:
    """Run the command and return its exit code; 128 + signal for a killed one, 127 where it cannot be started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too, and this process waits for its end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        # preexec_fn is safe before the second thread starts
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_prepare)
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_watch, daemon=True).start()
    code = child.wait()
    if _parent_gone.is_set():
        time.sleep(2 * GRACE)  # SIGKILL ends this sleep, and the command's children
    return 128 - code if code < 0 else code


def _prepare() -> None:
    """In the child: die with this process (Linux), and handle signals as usual."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
