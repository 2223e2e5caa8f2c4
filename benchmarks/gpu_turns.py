"""Benchmarks that share a GPU take turns: each loads when it likes, and measures when it holds the lock file."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Hold `lock`, a file that is made if need be, while the block runs; without one, just run it."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
