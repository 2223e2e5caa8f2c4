"""Strict JSON for files from strangers: no duplicate keys, no NaN, no endless nesting, a size limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lmeval_ext.storage.info import StorageError

MAX_BYTES = 100_000_000  # the safetensors library's own limit for a header (safetensors/src/tensor.rs, MAX_HEADER_SIZE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return record


def _no_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not JSON")


def parse_object(raw: bytes, what: str, fix: str) -> dict[str, Any]:
    """Parse one JSON object; `what` names it in the StorageError raised for anything else, `fix` ends the message."""
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise StorageError(f"{what} is not UTF-8 (byte {error.start}). {fix}") from None
    except RecursionError:
        raise StorageError(f"{what} is nested too deeply to be a checkpoint's. {fix}") from None
    except ValueError as error:
        raise StorageError(f"{what} is not valid JSON: {error}. {fix}") from None
    if not isinstance(record, dict):
        raise StorageError(f"{what} holds a JSON {type(record).__name__}, expected an object. {fix}")
    return record


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; StorageError names the file otherwise."""
    fix = "Download the file again."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise StorageError(f"{path} is larger than {MAX_BYTES:,} bytes, too large for a checkpoint's JSON. {fix}")
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from None
    return parse_object(raw, str(path), fix)
