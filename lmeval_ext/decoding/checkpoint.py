"""Decodes an EXL3 or EXL2 checkpoint to a dense state dict with the names of the unquantized checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from lmeval_ext.decoding import exl2, exl3
from lmeval_ext.errors import UserError
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_checkpoint, read_config
from lmeval_ext.storage.schemes import method_of

logger = logging.getLogger(__name__)

Parts = dict[str, torch.Tensor]
METHODS = ("exl2", "exl3")
PAD = {".trellis": exl3.BLOCK, ".q_weight": 32}  # the engines pad matrix dimensions to multiples of these

# Matrices that some Transformers models join (Phi-3, GLM-4), and the engines' names of their parts
FUSED = {".qkv_proj": (".q_proj", ".k_proj", ".v_proj"), ".gate_up_proj": (".gate_proj", ".up_proj")}


def exl_method(folder: str | Path) -> str | None:
    """The quantization method in a checkpoint folder's config if it is "exl2" or "exl3"; else None."""
    try:
        method = method_of(read_config(Path(folder)).quantization)
    except (StorageError, OSError):
        return None  # loading the checkpoint reports the problem
    return method if method in METHODS else None


def decode_exl3(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """One EXL3 matrix, dtype [out, in]. parts: its tensors by suffix. Raises ValueError for an unknown codebook."""
    names = [name for name in ("mcg", "mul1") if f".{name}" in parts]
    name = names[0] if names else "3inst"
    if names:
        multiplier = int(parts[f".{name}"].item()) & 0xFFFFFFFF
        if len(names) > 1 or multiplier != exl3.MULTIPLIERS[name]:
            raise ValueError(f"an unknown codebook: {' and '.join(names)}, multiplier {multiplier:#x}")
    sides = [parts[f".{s}h"] if f".{s}h" in parts else exl3.signs(parts[f".{s}"]) for s in ("su", "sv")]
    return exl3.decode(parts[".trellis"], sides[0], sides[1], name, dtype)


def decode_exl2(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """One EXL2 matrix, dtype [out, in]. parts: its tensors by suffix."""
    order = parts[".q_invperm"] if ".q_invperm" in parts else (parts[".q_perm"].long() & 0xFFFF).argsort()
    return exl2.decode(parts[".q_weight"], parts[".q_scale"], parts[".q_scale_max"], parts[".q_groups"], order, dtype)


# suffix of the payload: (suffixes of its side tensors, decoder). A matrix's bias keeps its name, as do dense tensors.
DECODERS: dict[str, tuple[tuple[str, ...], Callable[[Parts, torch.dtype], torch.Tensor]]] = {
    ".trellis": ((".suh", ".svh", ".su", ".sv", ".mcg", ".mul1"), decode_exl3),
    ".q_weight": ((".q_scale", ".q_scale_max", ".q_groups", ".q_invperm", ".q_perm", ".q_group_map"), decode_exl2),
}


def decoded(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    shapes: dict[str, tuple[int, ...]] | None = None,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, quantized matrices decoded to `dtype` [out, in] under BASE.weight.

    device: where to decode and to keep them. One matrix is decoded at a time, so peak memory is the dense model, one
    packed matrix and some 100 MB. shapes: of the model's own tensors, to which padded matrices are cut; tensors that it
    does not name stay as they are. quiet: no progress bar. Raises UserError if a matrix cannot be decoded, or if a
    tensor is left over.
    """
    folder = Path(folder)
    shapes = shapes or {}
    state: dict[str, torch.Tensor] = {}
    with ExitStack() as files:
        tensors = _Tensors(folder, device, files)
        matrices = list(_matrices(tensors.names))
        used = {base + suffix for base, payload in matrices for suffix in (payload, *DECODERS[payload][0])}
        for name in tensors.names - used:
            state[name] = tensors.read(name)
        for base, payload in tqdm(matrices, desc=f"Decoding {folder.name}", unit="matrix", disable=quiet):
            sides, decode = DECODERS[payload]
            parts = {
                suffix: tensors.read(base + suffix) for suffix in (payload, *sides) if base + suffix in tensors.names
            }
            try:
                weight = decode(parts, dtype)
            except KeyError as missing:
                raise UserError(f"{folder}: {base!r} has no tensor {missing}; download the checkpoint again") from None
            except ValueError as error:
                raise UserError(f"{folder}: {base!r} cannot be decoded: {error}") from None
            state[f"{base}.weight"] = _cut(weight, shapes.get(f"{base}.weight"), PAD[payload], f"{folder}: {base!r}")
            if f"{base}.bias" in state:
                state[f"{base}.bias"] = state[f"{base}.bias"][: len(state[f"{base}.weight"])]
    return _fuse(state, shapes)


class _Tensors:
    """Reads the tensors of a checkpoint by name, opening each file once."""

    def __init__(self, folder: Path, device: torch.device | str, files: ExitStack) -> None:
        try:
            self._stored = read_checkpoint(folder).tensors
        except StorageError as error:
            raise UserError(str(error)) from None
        self._device, self._files = device, files
        self._open: dict[Path, Any] = {}
        self.names = set(self._stored)

    def read(self, name: str) -> torch.Tensor:
        path = self._stored[name].path
        if path not in self._open:
            self._open[path] = self._files.enter_context(safe_open(path, framework="pt"))
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor.to(self._device)


def _matrices(names: set[str]) -> Iterator[tuple[str, str]]:
    """(base name, payload suffix) of every quantized matrix, in alphabetical order."""
    for name in sorted(names):
        for payload in DECODERS:
            base = name.removesuffix(payload)
            if base == name:
                continue
            if f"{base}.signs" in names:  # rows of 256, the engine's option --embed_bits
                raise UserError(
                    f"{base!r} is a quantized embedding table, which is not decoded here; run this checkpoint with "
                    "exllamav3, or convert it without --embed_bits"
                )
            yield base, payload


def _cut(weight: torch.Tensor, shape: tuple[int, ...] | None, multiple: int, what: str) -> torch.Tensor:
    """Remove the rows and columns that the engine added to reach a multiple. what: the matrix, for messages."""
    if shape is None or weight.shape == shape:
        return weight
    padded = tuple(ceil(n / multiple) * multiple for n in shape)
    if len(shape) != 2 or any(n not in (m, p) for n, m, p in zip(weight.shape, shape, padded, strict=True)):
        raise UserError(f"{what} is {list(weight.shape)}, but the model of config.json has {list(shape)} there")
    return weight[: shape[0], : shape[1]].contiguous()


def _fuse(state: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Join the matrices that the model has in one and the checkpoint in parts."""
    for name in shapes.keys() - state.keys():
        for joint, parts in FUSED.items():
            pieces = [name.replace(joint + ".", part + ".") for part in parts]
            if joint + "." in name and all(piece in state for piece in pieces):
                state[name] = torch.cat([state.pop(piece) for piece in pieces])
    return state
