"""Writes a file so that no reader ever sees half of it. `compare.files` is the other package's own copy."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and to the disk, then rename it to `path` in one step.

    The file gets the permissions that the user's umask gives. Raises OSError if it cannot be written; `path` is then
    as it was before.
    """
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
