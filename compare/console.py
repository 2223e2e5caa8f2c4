"""What `compare` says to the user, on stderr."""

from __future__ import annotations

import sys

from compare.text import clean


def say(message: str) -> None:
    """One line on stderr; what file names or labels hold cannot act on the terminal."""
    print(f"compare: {clean(message)}", file=sys.stderr)
