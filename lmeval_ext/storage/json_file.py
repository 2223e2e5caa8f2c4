"""Strict JSON for untrusted files: rejects duplicate keys, excessive nesting and oversized files.

NaN and Infinity are no JSON and are rejected, except in configs: transformers before 5 wrote them bare, for example
`"time_step_limit": [0.0, Infinity]` (huggingface/transformers#42959).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, unreadable

MAX_BYTES = 100_000_000  # the safetensors library's own limit for a header (safetensors/src/tensor.rs, MAX_HEADER_SIZE)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {duplicate[:80]!r} appears twice")
    return record


def _reject_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not JSON")


def parse_object(raw: bytes, what: str, fix: str, constants: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    constants: accept bare NaN, Infinity and -Infinity, as floats. Raises StorageError for anything else; `what` names
    the object in the message, `fix` ends the message.
    """
    accept = float if constants else _reject_constant
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=accept)
    except UnicodeDecodeError as error:
        raise StorageError(f"{what} is not UTF-8 (byte {error.start}). {fix}") from None
    except RecursionError:
        raise StorageError(f"{what} is nested too deeply for a checkpoint's JSON. {fix}") from None
    except ValueError as error:
        raise StorageError(f"{what} is not valid JSON: {error}. {fix}") from None
    if not isinstance(record, dict):
        raise StorageError(f"{what} holds a JSON {type(record).__name__}, expected an object. {fix}")
    return record


def read_object(path: Path, constants: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises StorageError, which names the file, for anything else.

    constants: accept bare NaN and Infinity, as in configs.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise StorageError(
                f"{path} is larger than {MAX_BYTES:,} bytes, too large for a checkpoint's JSON. {DOWNLOAD_AGAIN}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_object(raw, str(path), DOWNLOAD_AGAIN, constants)
