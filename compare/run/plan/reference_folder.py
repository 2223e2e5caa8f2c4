"""The folder of a reference store, as far as `compare run` needs it: who wrote the store, and whether it is complete.

The adapters write the store (`lmeval_ext.divergence.store`). Beside its files lies one mark per run that has written
its windows to the end::

    FOLDER/reference.json, head.safetensors, windows/
    FOLDER/KEY.complete        the fingerprint of the model that wrote it

A mark lies in the folder itself, so a removed or replaced folder is not complete any more.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from compare.errors import CompareError, os_reason
from compare.files import write_atomically

_MANIFEST, _HEAD, _WINDOWS = "reference.json", "head.safetensors", "windows"
_MARK = ".complete"


def is_store(folder: Path) -> bool:
    """Whether `folder` holds a store, whoever wrote it."""
    return (folder / _MANIFEST).is_file()


def is_complete(folder: Path, key: str) -> bool:
    """Whether the run with this key has written its windows into the store in `folder` to the end."""
    return is_store(folder) and (folder / f"{key}{_MARK}").is_file()


def writers(folder: Path) -> set[str]:
    """Fingerprints of the models that `compare run` has written into the store in `folder`."""
    return {mark.read_text().strip() for mark in folder.glob(f"*{_MARK}")} if is_store(folder) else set()


def mark_complete(folder: Path, key: str, writer: str) -> None:
    """Note that the run with this key, of the model with fingerprint `writer`, is complete in `folder`.

    Raises CompareError where the folder cannot be written to.
    """
    try:
        write_atomically(folder / f"{key}{_MARK}", f"{writer}\n".encode())
    except OSError as error:
        raise CompareError(f"{folder}: cannot be written ({os_reason(error)})") from error


def remove_store(folder: Path) -> None:
    """Remove the store and its marks; other files in the folder stay. Raises OSError where it cannot."""
    if not is_store(folder):
        return
    for mark in folder.glob(f"*{_MARK}"):
        mark.unlink(missing_ok=True)
    shutil.rmtree(folder / _WINDOWS, ignore_errors=True)
    (folder / _HEAD).unlink(missing_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)  # last: without it, the rest is not recognized as a store
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
