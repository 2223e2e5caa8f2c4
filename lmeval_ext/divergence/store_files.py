"""The files of a store: written atomically, read with their checksums."""

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

from lmeval_ext.errors import UserError
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


def json_sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Over names, dtypes, shapes, and the SHA-256 of every 16 MiB of bytes: an output matrix on as many cores."""
    return _sha256_of({name: _Part.of(tensor) for name, tensor in tensors.items()})


class _Part(NamedTuple):
    """A tensor, as files have it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Part:
        whole = tensor.detach().contiguous().cpu()
        name = _NAMES.get(whole.dtype, str(whole.dtype))
        return cls(name, tuple(whole.shape), memoryview(whole.view(-1).view(torch.uint8).numpy()))


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


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    about = {**about, "format": FORMAT, "version": str(VERSION), "sha256": tensors_sha256(plain)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(plain, about))
    except OSError as error:
        raise unwritable_store(path.parent, error) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, checked against the sum in it.

    It is opened once: safetensors' own reader opens a file twice, and another run may replace it in between. The
    tensors are views of what was read: copies would cost more than the reading, and hold the interpreter's lock.
    """
    try:
        with path.open("rb") as file:
            data = torch.from_numpy(np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8))
            whole = memoryview(data.numpy())
            if file.readinto(whole) != len(whole):
                raise damaged_store(path, "it was cut short while it was read")
        raw = bytes(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        stored, about = header_tensors(path, raw, len(whole))
        parts = {t.name: _Part(t.dtype, t.shape, whole[t.offset : t.offset + t.nbytes]) for t in stored}
        tensors = {t.name: data[t.offset : t.offset + t.nbytes].view(_DTYPES[t.dtype]).view(t.shape) for t in stored}
    except FileNotFoundError as error:
        raise damaged_store(path, "it is missing") from error
    except (StorageError, OSError, KeyError, RuntimeError) as error:
        raise damaged_store(path, failure_text(error)) from error
    verify_checksum(path, _sha256_of(parts), about)
    return tensors, about


def verify_checksum(path: Path, found: str, about: Mapping[str, str]) -> None:
    if (about.get("format"), about.get("version")) != (FORMAT, str(VERSION)):
        raise damaged_store(path, f"it is no part of a reference of version {VERSION}")
    if about.get("sha256") != found:
        raise damaged_store(path, "its checksum is wrong")


def failure_text(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def damaged_store(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: the stored reference is damaged ({why}); run the same task with save_reference= again, which writes "
        "anew what is missing or damaged (for reference.json, or under `compare run`: delete the whole folder first)"
    )


def unwritable_store(folder: Path, error: OSError) -> UserError:
    return UserError(f"save_reference={folder}: cannot be written to ({error.strerror or error}); name another folder")
