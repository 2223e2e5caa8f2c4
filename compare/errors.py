"""The two ways a command can fail, and the exit codes they stand for."""

from __future__ import annotations

USAGE = 1
NOTHING_USABLE = 2


class CompareError(Exception):
    """A message for the user, one line, and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
