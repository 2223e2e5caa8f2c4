"""Reads and writes a store's files: written atomically, checked against their checksums when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.files import write_atomically
from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.safetensors_header import header_tensors

FORMAT, VERSION = "lmeval-ext reference", 2

_PIECE = 16 << 20  # bytes that are hashed as one; part of the format
_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock

_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I16": torch.int16,
    "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, metadata and their checksum to `path`. Raises UserError if it cannot be written."""
    plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    metadata = {**metadata, "format": FORMAT, "version": str(VERSION), "sha256": tensors_sha256(plain)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(plain, metadata))
    except OSError as error:
        raise unwritable_store(path.parent, error) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a file. Raises UserError if it is missing or does not match its checksum.

    It is opened once: safetensors' own reader opens a file twice, and another run may replace it in between. The
    tensors are views of the bytes read: copies would take longer than reading, and hold the interpreter's lock.
    """
    try:
        with path.open("rb") as file:
            data = torch.from_numpy(np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8))
            content = memoryview(data.numpy())
            if file.readinto(content) != len(content):
                raise damaged_store(path, "it was truncated while it was read")
        header = bytes(content[8 : 8 + int.from_bytes(content[:8], "little")])
        stored, metadata = header_tensors(path, header, len(content))
        parts = {t.name: _Part(t.dtype, t.shape, content[t.offset : t.offset + t.nbytes]) for t in stored}
        tensors = {t.name: data[t.offset : t.offset + t.nbytes].view(_DTYPES[t.dtype]).view(t.shape) for t in stored}
    except FileNotFoundError as error:
        raise damaged_store(path, "it is missing") from error
    except (StorageError, OSError, KeyError, RuntimeError) as error:
        raise damaged_store(path, first_line(error)) from error
    verify_checksum(path, _sha256_of(parts), metadata)
    return tensors, metadata


def verify_checksum(path: Path, sha256: str, metadata: Mapping[str, str]) -> None:
    """Raises UserError unless the metadata is of this format and names the checksum `sha256` of the tensors."""
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
        raise damaged_store(path, f"it is not part of a reference of version {VERSION}")
    if metadata.get("sha256") != sha256:
        raise damaged_store(path, "its checksum is wrong")


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes, and the SHA-256 of every 16 MiB of bytes, which several cores compute."""
    return _sha256_of({name: _Part.of(tensor) for name, tensor in tensors.items()})


def json_sha256(facts: dict[str, Any]) -> str:
    """SHA-256 over the JSON of `facts` with sorted keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def damaged_store(path: Path, why: str) -> UserError:
    """The error for a damaged file of a store."""
    return UserError(
        f"{path}: the stored reference is damaged ({why}); run the same task with save_reference= again, which writes "
        "what is missing or damaged (for reference.json, or under `compare run`: delete the whole folder first)"
    )


def unwritable_store(folder: Path, error: OSError) -> UserError:
    """The error for a store that cannot be written."""
    return UserError(f"save_reference={folder}: cannot be written to ({error.strerror or error}); name another folder")


class _Part(NamedTuple):
    """A tensor as a safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Part:
        plain = tensor.detach().contiguous().cpu()
        name = _NAMES.get(plain.dtype, str(plain.dtype))
        return cls(name, tuple(plain.shape), memoryview(plain.view(-1).view(torch.uint8).numpy()))


def _sha256_of(parts: Mapping[str, _Part]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        dtype, shape, data = parts[name]
        digest.update(f"{name} {dtype} {list(shape)} ".encode())
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        if len(pieces) < 2:
            digest.update(b"".join(map(_sha256, pieces)))
            continue
        with ThreadPoolExecutor(_THREADS) as pool:
            digest.update(b"".join(pool.map(_sha256, pieces)))
    return digest.hexdigest()


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()
