"""`Quantization`: the description of the model in a result file."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lmeval_ext.storage import StorageError, StorageInfo, inspect
from lmeval_ext.storage.checkpoint import architecture
from lmeval_ext.storage.kv_cache import kv_cache
from lmeval_ext.storage.tensors import Header

logger = logging.getLogger(__name__)

GIB = 1024**3


@dataclass
class Quantization:
    """`config.quantization` of a result file: the model that was run, its bits, and the memory it took.

    Bits per weight and sizes follow `lmeval_ext.storage.StorageInfo`. weight_vram_gb: measured GiB that loading took.
    peak_vram_gb: measured GiB of weights and activations, without the engine's preallocated KV pool (kv_pool_gb).
    layer_parameters: logical elements of the decoder's matrices, the same for every quantization of one model.
    architecture: the decoder's `model_type` in config.json (`lmeval_ext.storage.checkpoint.architecture`).
    draft_bytes: bytes of draft layers (MTP) among weight_bytes, which no engine loads. kv_cache: bytes of a KV cache of
    kv_cache_dtype at any context (`lmeval_ext.storage.kv_cache.KVCache.to_dict`). kv_bytes_per_token: the same per
    token, where every token takes the same. bos: the rule by which texts of the harness' own requests become tokens
    (`Adapter.bos_rule`); token windows have their own, in the task's metadata. execution: "eager", "compiled"
    (torch.compile or graph capture), or which of them for what; None where the engine has no such choice.
    nan_loglikelihoods: log-likelihoods that were NaN, from which the harness computes accuracies nevertheless.
    None: unknown; `notes` says why.
    """

    label: str
    engine: str
    engine_version: str | None
    family: str | None = None
    scheme: str | None = None
    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = None
    file_bpw: float | None = None
    weight_bytes: int | None = None
    draft_bytes: int | None = None
    layer_parameters: int | None = None
    architecture: str | None = None
    kv_bytes_per_token: int | None = None
    kv_cache: dict[str, Any] | None = None
    kv_cache_dtype: str | None = None
    kernel: str | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    scoring: str | None = None
    execution: str | None = None
    bos: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    weight_vram_gb: float | None = None
    peak_vram_gb: float | None = None
    kv_pool_gb: float | None = None
    nan_loglikelihoods: int = 0
    notes: list[str] = field(default_factory=list)


def result_block(facts: Quantization) -> dict[str, Any]:
    """The block for the result file: plain JSON values only.

    Members of an enum become their values. Any other object, whose text form would change with the engine's version,
    becomes None, and a note says so.
    """
    notes: list[str] = []

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, Enum):
            return plain(name, value.value)
        if isinstance(value, dict):
            return {str(plain(name, key)): plain(name, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(name, item) for item in value]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):  # torch.__version__ is of a subclass
            return str(value)
        if isinstance(value, numbers.Integral):  # NumPy's numbers too
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        notes.append(f"{name} unknown: the engine gave an object of type {type(value).__name__}")
        return None

    block = {name: plain(name, value) for name, value in asdict(facts).items()}
    block["notes"] = [note for note in block["notes"] if note is not None] + notes
    return block


def from_storage(
    path: str | None,
    cache_types: tuple[str | int | None, str | int | None] = (None, None),
    headers: Sequence[Header] | None = None,
    precision: int | None = None,
    windowed_cache: bool = True,
    **facts: Any,
) -> Quantization:
    """A Quantization with the figures from the checkpoint's headers; None and a note for figures they do not give.

    cache_types: types of keys and values in the engine's KV cache, as for `kv_cache`; None: the checkpoint's own.
    headers, precision: as for `storage.inspect`.
    windowed_cache: whether the engine drops tokens that have left a sliding window.
    """
    if path is None:
        return Quantization(**facts, notes=["bits per weight unknown: the checkpoint is not a local file or folder"])
    cache = kv_cache(path, *cache_types, windows=windowed_cache)
    facts["architecture"] = architecture(Path(path))
    facts |= {"kv_bytes_per_token": cache.bytes_per_token, "kv_cache_dtype": cache.dtype, "kv_cache": cache.to_dict()}
    try:
        info: StorageInfo = inspect(path, headers, precision)
    except (StorageError, OSError) as error:
        logger.warning("bits per weight unknown: %s", error)
        return Quantization(**facts, notes=[f"bits per weight unknown: {error}", *filter(None, [cache.note])])
    return Quantization(
        **facts,
        family=info.family,
        scheme=info.scheme,
        layer_bpw=info.layer_bpw,
        head_bpw=info.head_bpw,
        vram_gb=info.vram_gb,
        file_bpw=info.file_bpw,
        weight_bytes=info.weight_bytes,
        draft_bytes=sum(part.bits for part in info.excluded if part.kind == "draft") // 8,
        layer_parameters=info.layer_elements or None,
        notes=[*info.notes, *filter(None, [cache.note])],
    )


def quantized_at_load(facts: Quantization, method: str) -> Quantization:
    """Corrects the description of a checkpoint that the engine quantized at load, which its headers do not show."""
    facts.family = facts.scheme = method
    facts.layer_bpw = facts.head_bpw = facts.vram_gb = facts.file_bpw = facts.weight_bytes = None
    facts.draft_bytes = None
    facts.notes.append(f"bits per weight unknown: quantized at load ({method}), not in the checkpoint")
    return facts
