"""Reads the tensors of a checkpoint folder by name: from safetensors, or, if asked to, from PyTorch's pickles.

A pickle can run code. It is read with `torch.load(weights_only=True)` alone, which builds tensors and nothing else, and
only if the user asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_checkpoint
from lmeval_ext.storage.files import path_inside
from lmeval_ext.storage.tensors import Form, Header, TensorTable

PICKLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
# One line of Python that a user can run, for messages
CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
    "torch.load('pytorch_model.bin', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\""
)
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


class StoredTensors:
    """The tensors of a checkpoint, read when asked for; each file is opened once."""

    def __init__(self, folder: Path, device: torch.device | str, files: ExitStack, allow_pickle: bool = False) -> None:
        """folder: of the checkpoint. device: where tensors are put. files: closes the files that are opened.

        Raises UserError for files that cannot be read, and for pickles unless they are allowed.
        """
        self._device, self._files = device, files
        self._open: dict[Path, Any] = {}
        self._loaded: Mapping[str, torch.Tensor] = {}
        if has_only_pickles(folder):
            if not allow_pickle:
                raise UserError(
                    f"{folder} has its weights in {PICKLE}, a pickle, which can run code: add allow_pickle=True to "
                    f"read it with torch.load(weights_only=True), or convert it in that folder: {CONVERT}"
                )
            self._loaded = load_pickles(folder)
            self._stored = TensorTable([header_of(folder, self._loaded)])
        else:
            try:
                self._stored = read_checkpoint(folder).tensors
            except StorageError as error:
                raise UserError(str(error)) from None
        self.names = set(self._stored)

    def dtype(self, name: str) -> str:
        """Its dtype, as safetensors names it."""
        return self._stored[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def read(self, name: str) -> torch.Tensor:
        if self._loaded:
            return self._loaded[name].to(self._device)
        path = self._stored[name].path
        if path not in self._open:
            self._open[path] = self._files.enter_context(safe_open(path, framework="pt"))
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor.to(self._device)


def has_only_pickles(folder: Path) -> bool:
    """Whether a checkpoint folder has PyTorch's pickles and no safetensors file."""
    return not any(folder.glob("*.safetensors")) and any((folder / name).exists() for name in (PICKLE, INDEX))


def load_pickles(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's pickles, mapped from the files. Raises UserError if they hold anything else."""
    tensors: dict[str, torch.Tensor] = {}
    for path in _pickles(folder):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise UserError(
                f"{path} cannot be read as tensors alone ({first_line(error)}); convert the checkpoint to safetensors "
                "where you trust it"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise UserError(f"{path} is not a flat state dict of tensors; expected tensors by name")
        if twice := sorted(tensors.keys() & content.keys()):
            raise UserError(f"{path}: tensor {twice[0]!r} is also in another file; download the checkpoint again")
        tensors |= content
    return tensors


def header_of(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Header:
    """The names, dtypes and shapes of loaded tensors as the header of a file; their contents cannot be read there."""
    forms = [
        Form(_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for tensor in tensors.values()
    ]
    path = folder / PICKLE
    end = path.stat().st_size if path.exists() else 0
    return Header(path, list(tensors), forms, [end] * len(forms))


def _pickles(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return [folder / PICKLE]
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        return [path_inside(folder, name) for name in sorted(names)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is not a shard index ({first_line(error)})") from None
