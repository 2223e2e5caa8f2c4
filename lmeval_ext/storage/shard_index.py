"""The index of a sharded checkpoint, model.safetensors.index.json: which shard holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmeval_ext.storage.files import check_plain, path_inside
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, unreadable
from lmeval_ext.storage.json_file import MAX_BYTES, read_object

INDEX = "model.safetensors.index.json"
_QUOTES_PER_TENSOR = 4


def index_files(folder: Path) -> dict[str, str]:
    """Return the file names by tensor, as the index has them. The names are not checked.

    Raises StorageError if the index cannot be read, or is not an index.
    """
    index = path_inside(folder, INDEX)
    files = _quickly(index) or read_object(index).get("weight_map")
    if not isinstance(files, dict) or set(map(type, files.values())) - {str}:
        raise StorageError(f"{index} has no weight_map of tensor names to file names. {DOWNLOAD_AGAIN}")
    return files


def _quickly(index: Path) -> Any:
    """Return the weight_map without the strict reader's check of every key, if no key can be in it twice.

    An index of a mixture of experts has 300,000 keys; a key that is there twice shows in the number of quotation marks.
    """
    try:
        raw = index.read_bytes() if index.stat().st_size <= MAX_BYTES else b""
        files = json.loads(raw)["weight_map"]
    except OSError as error:
        raise unreadable(index, error) from None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    key = b'"weight_map"'
    quotes = raw.count(b'"', raw.find(key) + len(key))
    unique = isinstance(files, dict) and b"\\" not in raw and quotes == _QUOTES_PER_TENSOR * len(files)
    return files if unique else None


def check_index(folder: Path) -> None:
    """Raise StorageError if the shard index cannot be read, or names a file outside the folder.

    Protects engines that would open such a file. No weight file is opened here; `files.path_inside` checks links.
    """
    if (folder / INDEX).exists():
        for name in set(index_files(folder).values()):
            check_plain(folder, name)
