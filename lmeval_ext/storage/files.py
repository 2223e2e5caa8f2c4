"""Files of an untrusted checkpoint: they are opened only inside the checkpoint, whatever it says their names are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lmeval_ext.storage.info import StorageError


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file.

    Raises StorageError if the name, or a link, leads out of the checkpoint. Links into the `blobs` folder beside
    `snapshots` are allowed: that is the layout of the Hugging Face cache.
    """
    check_plain(folder, name)
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise StorageError(f"{path} is a circular link. Replace it with the file.") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise StorageError(f"{path} is a link out of the checkpoint, to {target}. Replace it with the file.")
    if target.exists() and not target.is_file():
        raise StorageError(f"{path} is not a regular file. Give the folder of a complete checkpoint.")
    return path


def check_plain(folder: Path, name: str) -> None:
    """Raise StorageError if a file name leads out of the folder, or cannot be a file's."""
    if not name or name in (".", "..") or re.search(r"[/\\:\x00]", name) or not _encodable(name):
        raise StorageError(
            f"{folder}: the file name {name[:200]!r} in the shard index is not a plain name in this folder. "
            "Do not trust this checkpoint. Download it again from its source."
        )


def _encodable(name: str) -> bool:
    """Return whether the file system can hold the name; a name from JSON may contain a lone surrogate."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
