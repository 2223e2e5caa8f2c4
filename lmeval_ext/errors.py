"""Errors that a user can fix: one line that names the cause and the fix, without a traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType


class UserError(ValueError):
    """Invalid input. The message names the file or argument, what was expected, and the fix.

    A subclass of ValueError, so that programs that call the harness can catch it like any invalid argument; on the
    command line `install_excepthook` shows the message alone.
    """


class MissingEngineError(UserError, ImportError):
    """An engine is not installed; the message names the package to install and the extra that contains it."""


def install_excepthook() -> None:
    """Shows an uncaught UserError as one line on stderr; Python still exits with code 1.

    All other errors go to the previous hook. `LMEVAL_EXT_TRACEBACK=1` shows tracebacks again.
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
    """The first line of an error's message; its type's name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
