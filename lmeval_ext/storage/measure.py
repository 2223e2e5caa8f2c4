"""From a path to a StorageInfo: choose the reader, name family and scheme, sum up."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmeval_ext.storage.accounting import account, main_packing
from lmeval_ext.storage.checkpoint import Checkpoint, read_checkpoint
from lmeval_ext.storage.grouping import group_tensors
from lmeval_ext.storage.info import StorageError, StorageInfo, unreadable
from lmeval_ext.storage.packings import FAMILIES
from lmeval_ext.storage.safetensors_header import DTYPE_BITS, FLOAT8
from lmeval_ext.storage.schemes import DENSE_NAMES, SCHEMES, UNSUPPORTED, method_of
from lmeval_ext.storage.tensors import Header

DENSE = frozenset(DTYPE_BITS) - FLOAT8  # dtypes of weights that are not quantized


def measure(path: Path, headers: Sequence[Header] | None = None, precision: int | None = None) -> StorageInfo:
    """Measure a checkpoint; see `lmeval_ext.storage.inspect`."""
    try:
        if not path.exists():
            raise StorageError(f"{path} does not exist. Give a checkpoint folder, a .safetensors file or a .gguf file.")
        gguf = gguf_file(path) if headers is None else None
        if gguf:
            return _measure_gguf(gguf)
        if path.is_file() and path.suffix != ".safetensors":
            raise StorageError(
                f"{path} is neither a .safetensors file nor a .gguf file (pickles are never opened). Give the folder "
                "of a checkpoint, or a file of one of these kinds."
            )
        if not path.is_file() and not path.is_dir():
            raise StorageError(f"{path} is not a regular file. Give a checkpoint folder or file.")
        with _collector_paused():
            checkpoint = read_checkpoint(path, headers)
            checkpoint.precision = precision
            return _measure_safetensors(checkpoint)
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, which takes a third of the time while 300,000 tensors are read."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for; None if it stands for something else.

    path: a GGUF file (by its name or its first bytes), or a folder with one GGUF model and no safetensors. Raises
    StorageError for a folder with several models.
    """
    if not path.is_dir():
        return path if path.is_file() and (path.suffix.lower() == ".gguf" or _has_magic(path)) else None
    names = sorted(file.name for file in path.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name]
    models = [name for name in ggufs if "-of-" not in name or "-00001-of-" in name] or ggufs[:1]
    if len(models) > 1:  # an importance matrix or an adapter often lies beside its model
        models = [name for name in models if not _holds_no_model(path / name)] or models
    if len(models) > 1:
        raise StorageError(f"{path} holds {len(models)} GGUF models. Name one of: {', '.join(models)}.")
    return path / models[0] if models else None


def _holds_no_model(path: Path) -> bool:
    """Return whether a GGUF file is an importance matrix, an adapter or the like; False for an unreadable one."""
    from lmeval_ext.storage.foreign_gguf import not_a_model
    from lmeval_ext.storage.gguf_header import read_gguf  # imports numpy, through gguf: 0.1 s

    try:
        return not_a_model(read_gguf(path).metadata) is not None
    except StorageError:
        return False


def _has_magic(path: Path) -> bool:
    """Return whether a file starts with GGUF's magic bytes (gguf.constants.GGUF_MAGIC), whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _measure_gguf(path: Path) -> StorageInfo:
    from lmeval_ext.storage.gguf_checkpoint import read_gguf_checkpoint  # imports numpy, through gguf: 0.1 s

    weights, scheme, notes = read_gguf_checkpoint(path)
    # llama.cpp uses token_embd.weight for a model without output.weight (llama-model.cpp, TENSOR_DUPLICATED).
    return account(weights, family="GGUF", scheme=scheme, tied=True, notes=notes)


def _measure_safetensors(checkpoint: Checkpoint) -> StorageInfo:
    """Group the tensors, name scheme and family, sum up. A method without a row in `SCHEMES` gives no figures."""
    weights = group_tensors(checkpoint.tensors, checkpoint.facts)
    packing = main_packing(weights, DENSE)
    notes, config = list(checkpoint.notes), checkpoint.quantization
    method = method_of(config)
    unsupported = None
    notes += _precisions(method, config, checkpoint.precision)
    if method is None:
        if config:
            notes.append("the quantization config names no quant_method")
        scheme = DENSE_NAMES.get(packing or "")
        if scheme is None:
            notes.append("no quantization config says which scheme this is: scheme is null")
    elif method in SCHEMES:
        scheme = SCHEMES[method](
            config if checkpoint.precision is None else {**config, "precision": checkpoint.precision}
        )
        if packing in DENSE:
            notes.append(f"config.json says {method}, but no layer is stored quantized")
            scheme = DENSE_NAMES.get(packing or "")
        elif scheme is None:
            notes.append(f"the {method} config does not say which scheme this is: scheme is null")
    else:
        scheme = None
        unsupported = f"quant_method {method!r} is not supported: bits per weight are null"
    family = _family(packing, UNSUPPORTED.get(method or "", method) if unsupported else None)
    return account(weights, family=family, scheme=scheme, tied=checkpoint.tied, notes=notes, unsupported=unsupported)


def _precisions(method: str | None, config: Mapping[str, Any], precision: int | None) -> list[str]:
    """Return the note on a checkpoint that holds the model at several precisions."""
    if method != "anyprec" or config.get("seed_precision") == config.get("parent_precision"):
        return []
    held = f"{config.get('seed_precision')} to {config.get('parent_precision')} bits"
    if precision is None:
        return [f"sizes are of the file, which holds the model at {held}: one that runs is smaller"]
    return [f"sizes are of the model at {precision} bits, out of a file that holds it at {held}"]


def _family(packing: str | None, unsupported: str | None) -> str | None:
    """Return the family's name; unsupported: the name of a method without a row in `SCHEMES`, which wins."""
    if unsupported:
        return unsupported
    if packing is None or packing == "unknown":
        return None
    if packing.startswith("F8_"):
        return "FP8"
    return FAMILIES.get(packing, "full precision")
