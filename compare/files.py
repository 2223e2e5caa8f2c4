"""Writes a file so that no reader ever sees half of it. `lmeval_ext.files` is the other package's own copy."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

from compare.errors import CompareError


def write_output(path: Path, content: bytes) -> None:
    """Write the file that the user named with `-o`. Raises CompareError if it is a folder or cannot be written."""
    if path.is_dir():
        raise CompareError(f"-o {path}: is a folder; name a file in it")
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CompareError(f"-o {path}: cannot be written ({error.strerror or error}); name another place") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it to `path` in one step.

    The file gets the permissions that the user's umask gives. Raises OSError if it cannot be written; `path` is then
    as it was before.
    """
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
