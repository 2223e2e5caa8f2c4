"""What the demo's scripts share: outputs that appear complete or not at all, and one-line errors."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(Exception):
    """Bad input; the message names the argument or file, what was expected, and the fix."""


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a UsageError ends the program with its message and exit code 1, without a traceback."""
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists already: remove it, or name another output")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; it becomes `path` if the block ends without an error."""
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        work = scratch / path.name
        work.mkdir()  # mkdtemp's folder is closed to other users; this one follows the umask
        yield work
        work.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; it becomes `path` if the block ends without an error."""
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def checkpoint(argument: str) -> Path:
    """Returns a checkpoint folder given on the command line (UsageError unless it has config.json and weights)."""
    folder = Path(argument)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: expected the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} has no .safetensors file: only safetensors weights are read")
    return folder
