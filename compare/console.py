"""Messages of `compare` to the user, on stderr."""

from __future__ import annotations

import sys

from compare.text import clean


def say(message: str) -> None:
    """Print one line to stderr, with control characters escaped: labels and file names cannot act on the terminal."""
    print(f"compare: {clean(message)}", file=sys.stderr)
