"""Decodes a quantized checkpoint to a dense state dict with the names of the unquantized checkpoint.

Every stored tensor must have a use: a matrix that lacks a tensor, a tensor that no matrix uses, and one of an
unexpected shape are errors, since each could be the reason for a wrong weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lmeval_ext.decoding import anyprecision
from lmeval_ext.decoding.formats import METHODS, Format, Rows
from lmeval_ext.decoding.parts import Matrix
from lmeval_ext.decoding.stored import StoredTensors
from lmeval_ext.errors import UserError
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_checkpoint, read_config
from lmeval_ext.storage.roles import BUFFERS, CACHE_SCALE
from lmeval_ext.storage.safetensors_header import FLOAT8, FLOATS
from lmeval_ext.storage.schemes import method_of
from lmeval_ext.storage.tensors import StoredTensor

# Matrices that some Transformers models join (Phi-3, GLM-4), and the checkpoints' names of their parts
FUSED = {".qkv_proj": (".q_proj", ".k_proj", ".v_proj"), ".gate_up_proj": (".gate_proj", ".up_proj")}

# Methods of which Transformers runs some checkpoints and misreads others, by the tensors: "fp8" names two layouts, a
# checkpoint without a quantization config ("none") may be dense, and of NVFP4 experts in compressed-tensors, which it
# joins, it has no use for the divisors (5.19 and 5.24).
_BY_TENSORS = frozenset({"fp8", "none", "compressed-tensors"})
_EXPERT_DIVISOR = re.compile(r"\.experts\.[0-9]+\..*\.weight_global_scale$")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


class Source(NamedTuple):
    """What a checkpoint is: its quantization method, one of `METHODS`, and its quantization config."""

    method: str
    quantization: Mapping[str, Any]


def decoding_method(folder: str | Path) -> str | None:
    """The quantization method of a checkpoint folder if it is decoded here; None if it is for Transformers."""
    source = source_of(Path(folder))
    return None if source is None else source.method


def tensors_decide(folder: Path) -> bool:
    """Whether a quantized checkpoint's config leaves open if it is decoded here, so that its tensors are needed."""
    try:
        return method_of(read_config(folder).quantization) in _BY_TENSORS
    except (StorageError, OSError):
        return False


def source_of(folder: Path) -> Source | None:
    """The method and the quantization config of a checkpoint that is decoded here; None for any other."""
    try:
        quantization = read_config(folder).quantization
        method = method_of(quantization) or "none"
        if method not in METHODS or (method in _BY_TENSORS and not _is_misread(folder, method, quantization)):
            return None
    except (StorageError, OSError):
        return None  # loading the checkpoint reports the problem
    return Source(method, quantization)


def checked_precision(folder: Path, precision: object) -> int | None:
    """The precision that a checkpoint runs at: the one asked for, else its highest; None for other formats.

    Raises UserError for a precision that it does not hold.
    """
    source = source_of(folder)
    if source is None or source.method != "anyprec":
        if precision is None:
            return None
        raise UserError(f"precision={precision}: {folder} holds one precision, not several; drop precision=")
    try:
        lowest, highest = anyprecision.precisions(source.quantization)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    if precision is None:
        return highest
    if isinstance(precision, bool) or not isinstance(precision, int) or not lowest <= precision <= highest:
        raise UserError(f"precision={precision}: {folder} holds {lowest} to {highest}; give one of them")
    return precision


def _is_misread(folder: Path, method: str, quantization: Mapping[str, Any]) -> bool:
    """Whether the tensors are of a layout that Transformers loads without its scales, or with the wrong ones."""
    tensors = read_checkpoint(folder).tensors
    if method == "compressed-tensors":
        sparsity = quantization.get("sparsity_config")
        sparse = isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense")
        if sparse or quantization.get("transform_config"):
            return False  # neither is decoded here
        return any(map(_EXPERT_DIVISOR.search, tensors))
    packed = (name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed"))
    if method == "none" and any(f"{name}_scale" in tensors for name in packed):
        return True
    return _has_misread_floats(tensors, quantization.get("weight_block_size"))


def _has_misread_floats(tensors: Mapping[str, StoredTensor], block: Any) -> bool:
    """Whether a float8 weight is stored in a way that Transformers misreads.

    With a `weight_scale` beside it (the layout of AutoFP8, vLLM and ModelOpt), which Transformers drops; or in blocks
    that do not divide the matrix, which it spreads evenly over the matrix where it decodes them (5.19, 5.24).
    """
    for name in tensors:
        weight = name.removesuffix("_scale").removesuffix("_scale_inv")
        if weight == name or weight not in tensors or tensors[weight].dtype not in FLOAT8:
            continue
        if name.endswith(".weight_scale"):
            return True
        shape = tensors[weight].shape
        if (
            isinstance(block, list)
            and len(block) == len(shape) == 2
            and any(
                isinstance(size, int) and size > 0 and length % size for length, size in zip(shape, block, strict=True)
            )
        ):
            return True
    return False


def decoded(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    quiet: bool = False,
    precision: int | None = None,
    allow_pickle: bool = False,
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, quantized matrices decoded to `dtype` [out, in] under BASE.weight.

    device: where to decode and to keep them. One matrix is decoded at a time, so peak memory is the dense model, one
    packed matrix and some 100 MB. shapes: of the model's own tensors, which matrices must have (padded ones are cut);
    tensors that it does not name stay as they are. quiet: no progress bar. precision: bits per weight to decode a
    checkpoint of several precisions at; None: the highest. allow_pickle: read PyTorch's pickles. Raises UserError if a
    matrix cannot be decoded, or if a tensor is left over.
    """
    folder = Path(folder)
    source = source_of(folder)
    if source is None:
        raise UserError(f"{folder}: its format is not decoded here; known methods are {', '.join(sorted(METHODS))}")
    shapes = shapes or {}
    state: dict[str, torch.Tensor] = {}
    with ExitStack() as files:
        tensors = StoredTensors(folder, device, files, allow_pickle)
        matrices = list(_matrices(folder, tensors, source.method))
        _check_alike(folder, matrices)
        used = {base + suffix for base, row, _ in matrices for suffix in row.suffixes}
        rest = sorted(tensors.names - used)
        _check_rest(folder, tensors, rest, {base for base, _, _ in matrices}, source.method)
        for name in rest:
            state[name] = tensors.read(name)
        for base, row, suffixes in tqdm(matrices, desc=f"Decoding {folder.name}", unit="matrix", disable=quiet):
            matrix = Matrix(base, source.quantization, precision)
            parts = {suffix: tensors.read(base + suffix) for suffix in suffixes if suffix not in row.unused}
            try:
                weight = row.decode(parts, dtype, matrix)
            except ValueError as error:
                raise UserError(f"{folder}: {base!r} cannot be decoded: {error}") from None
            state[f"{base}.weight"] = _cut(weight, shapes.get(f"{base}.weight"), row.multiple, f"{folder}: {base!r}")
            if f"{base}.bias" in state:
                state[f"{base}.bias"] = state[f"{base}.bias"][: len(state[f"{base}.weight"])]
    return _fuse(state, shapes)


_Found = tuple[str, Format, tuple[str, ...]]  # base name, row, suffixes of the tensors that exist


def _matrices(folder: Path, tensors: StoredTensors, method: str) -> Iterator[_Found]:
    """Every quantized matrix in alphabetical order. Raises UserError for one that no row describes."""
    by_payload = Rows.of(method).by_payload
    for name in sorted(tensors.names):
        for payload, rows in by_payload.items():
            base = name.removesuffix(payload)
            if base == name or (tensors.dtype(name) in FLOATS and payload == ".weight"):
                continue
            if f"{base}.signs" in tensors.names:  # rows of 256, ExLlamaV3's option --embed_bits
                raise UserError(
                    f"{base!r} is a quantized embedding table, which is not decoded here; run this checkpoint with "
                    "exllamav3, or convert it without --embed_bits"
                )
            problems = [_problem(row, base, tensors) for row in rows]
            if all(problems):
                raise UserError(f"{folder}: {min(filter(None, problems))[1]}")
            row = rows[problems.index(None)]
            yield base, row, tuple(suffix for suffix in row.suffixes if base + suffix in tensors.names)


def _problem(row: Format, base: str, tensors: StoredTensors) -> tuple[int, str] | None:
    """Why a row does not describe a matrix: how much is wrong, and the first thing; None if it does."""
    dtype = tensors.dtype(base + row.payload)
    if dtype not in row.dtypes:
        return 9, f"{base + row.payload!r} is {dtype}, expected {' or '.join(sorted(row.dtypes))}"
    missing = [suffix for suffix in row.required if base + suffix not in tensors.names]
    if missing:
        return len(missing), f"{base!r} has no tensor {missing[0]!r}: it is incomplete, or not of this format"
    for suffix, dtypes in row.required.items():
        if dtypes and tensors.dtype(base + suffix) not in dtypes:
            found = tensors.dtype(base + suffix)
            return 5, f"{base + suffix!r} is {found}, expected {' or '.join(sorted(dtypes))}"
    return None


def _check_alike(folder: Path, matrices: list[_Found]) -> None:
    """Raises UserError if a matrix lacks a tensor that the same matrix of other layers has."""
    seen: dict[tuple[str, Format], tuple[str, set[str]]] = {}
    for base, row, suffixes in matrices:
        present = {suffix for suffix in suffixes if suffix in row.optional}
        other, expected = seen.setdefault((_NUMBER.sub("N", base), row), (base, present))
        if different := sorted(present ^ expected):
            has, lacks = (base, other) if different[0] in present else (other, base)
            raise UserError(f"{folder}: {has!r} has a tensor {different[0]!r}, but {lacks!r} has none: one is wrong")


def _check_rest(folder: Path, tensors: StoredTensors, names: list[str], bases: set[str], method: str) -> None:
    """Raises UserError if one of the tensors that no matrix uses belongs to a quantization."""
    sides = {suffix for row in Rows.of(method).by_payload.values() for r in row for suffix in r.suffixes} - {".weight"}
    for name in names:
        base, _, last = name.rpartition(".")
        if CACHE_SCALE.search(name) or BUFFERS.search(name):
            continue
        above = {name[: match.start()] for match in re.finditer(r"\.", name)}
        strange = tensors.dtype(name) not in FLOATS or f".{last}" in sides
        if strange or (above & bases and not (last == "bias" and base in bases)):
            raise UserError(
                f"{folder}: no {method} matrix uses {name!r} ({tensors.dtype(name)} {list(tensors.shape(name))}): the "
                "checkpoint is of another version of its format, or damaged"
            )


def _cut(weight: torch.Tensor, shape: tuple[int, ...] | None, multiple: int, what: str) -> torch.Tensor:
    """Remove the rows and columns that the engine added to reach a multiple. what: the matrix, for messages."""
    if shape is None or weight.shape == shape:
        return weight
    padded = tuple(ceil(n / multiple) * multiple for n in shape)
    if len(shape) != 2 or any(n not in (m, p) for n, m, p in zip(weight.shape, shape, padded, strict=True)):
        raise UserError(f"{what} is {list(weight.shape)}, but the model of config.json has {list(shape)} there")
    return weight[: shape[0], : shape[1]].contiguous()


def _fuse(state: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Join the matrices that the model has in one and the checkpoint in parts."""
    for name in shapes.keys() - state.keys():
        for joint, parts in FUSED.items():
            pieces = [name.replace(joint + ".", part + ".") for part in parts]
            if joint + "." in name and all(piece in state for piece in pieces):
                state[name] = torch.cat([state.pop(piece) for piece in pieces])
    return state
