"""Runs a command and ends it, with all its children, when the one who started it is gone.

``python lifeline.py COMMAND …``: standard input is the lifeline, a pipe whose other end the starter holds. However
the starter ends, kill -9 included, the pipe closes, and the whole process group is ended: no engine keeps a GPU
for a result that nobody will collect. If this process itself is killed, Linux kills the command. Standard library
only: this interpreter starts without site-packages.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds between the polite and the final signal
_gone = threading.Event()

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too and ends; this waits for it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        # Popen's preexec_fn is safe here: there is no second thread yet
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_prepare)
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_watch, daemon=True).start()
    code = child.wait()
    if _gone.is_set():
        time.sleep(2 * GRACE)  # the final signal comes first; it also reaches what the command left behind
    return 128 - code if code < 0 else code


def _prepare() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch() -> None:
    while os.read(0, 1):
        pass
    _gone.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
