"""Writing a file so that a reader never meets half of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compare.errors import CompareError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then move it there in one step.

    Raises CompareError when the folder is missing or cannot be written to; `path` is then as it was.
    """
    if path.is_dir():
        raise CompareError(f"-o {path}: is a folder; name a file in it")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101  (mkstemp makes it private)
        os.replace(temporary, path)  # noqa: PTH105
        temporary = None
    except OSError as error:
        raise CompareError(f"-o {path}: cannot be written ({error.strerror or error}); name another place") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
