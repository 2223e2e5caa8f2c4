"""`CompareError`: what a user can correct, with the exit code of the command."""

from __future__ import annotations

USAGE = 1
NOTHING_USABLE = 2


class CompareError(Exception):
    """A one-line message for the user, and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def os_reason(error: OSError) -> str:
    """The system's words for an error (``"No space left on device"``), without number and file name."""
    return error.strerror or first_line(error)
