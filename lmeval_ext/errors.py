"""Errors that a user can mend: one line that names the cause and the fix, no traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType


class UserError(ValueError):
    """Bad input. The message names the file or argument, what was expected, and the fix.

    A subclass of ValueError, so that programs that call the harness can catch it as they would any
    bad argument; on the command line `install_excepthook` shows the message alone.
    """


class MissingEngineError(UserError, ImportError):
    """An engine that is not installed: the message says what to install and which extra has it."""


def install_excepthook() -> None:
    """Show an uncaught UserError as one line on stderr; Python then exits with code 1 as for any other.

    Everything else goes to the hook that was there. `LMEVAL_EXT_TRACEBACK=1` shows tracebacks again.
    """
    previous = sys.excepthook
    if getattr(previous, "_lmeval_ext", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError) and os.environ.get("LMEVAL_EXT_TRACEBACK", "0") in ("", "0"):
            print(f"lmeval-ext: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._lmeval_ext = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def first_line(error: BaseException) -> str:
    """An engine's error as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
