"""The folder of a reference store, as far as `compare run` has to know: whether a run has filled it, and whose it is.

The store is the adapters' (`lmeval_ext.divergence.store`); beside its files lies a mark of each run that has filled it
to the end::

    FOLDER/reference.json, head.safetensors, windows/
    FOLDER/KEY.complete        the fingerprint of the model that wrote it

A mark goes where its folder goes: with the folder removed or replaced, the reference is not complete any more.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from compare.files import write_atomically

_MANIFEST, _HEAD, _WINDOWS = "reference.json", "head.safetensors", "windows"
_MARK = ".complete"


def is_store(folder: Path) -> bool:
    """Whether there is a store at all, whoever wrote it."""
    return (folder / _MANIFEST).is_file()


def is_complete(folder: Path, key: str) -> bool:
    """Whether the run of `key` has filled the store in `folder`."""
    return is_store(folder) and (folder / f"{key}{_MARK}").is_file()


def writers(folder: Path) -> set[str]:
    """Fingerprints of the models that filled the store in `folder`, as far as runs of this command did."""
    return {mark.read_text().strip() for mark in folder.glob(f"*{_MARK}")} if is_store(folder) else set()


def mark_complete(folder: Path, key: str, writer: str) -> None:
    """Note that the run of `key`, of the model `writer`, has filled `folder`. Raises OSError where it cannot."""
    write_atomically(folder / f"{key}{_MARK}", f"{writer}\n".encode())


def remove_store(folder: Path) -> None:
    """Remove the store and its marks; what else lies in the folder stays. Raises OSError where it cannot."""
    if not is_store(folder):
        return
    for mark in folder.glob(f"*{_MARK}"):
        mark.unlink(missing_ok=True)
    shutil.rmtree(folder / _WINDOWS, ignore_errors=True)
    (folder / _HEAD).unlink(missing_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)  # last: without it, nothing here is known to be a store
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
