"""The quantities of the x axis: bits per weight, or the size of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compare.comparison.memory import GIB, memory_bytes
from compare.results.records import Record


@dataclass(frozen=True)
class Axis:
    """A quantity for the x axis. value: reads it from a record. per_weight: bits per weight, not a model's size."""

    key: str
    name: str
    short: str
    value: Callable[[Record], float | None]
    per_weight: bool = False


def _gib(record: Record) -> float | None:
    weight_bytes = record.quantization.weight_bytes
    return None if weight_bytes is None else weight_bytes / GIB


AXES: dict[str, Axis] = {
    axis.key: axis
    for axis in (
        Axis("bpw", "Bits per weight (decoder layers)", "bits per weight", lambda r: r.quantization.layer_bpw, True),
        Axis("vram", "VRAM of decoder and head weights (GB = 1024³ bytes)", "VRAM", lambda r: r.quantization.vram_gb),
        Axis("file_bpw", "Bits per weight (all tensors)", "bits per weight", lambda r: r.quantization.file_bpw, True),
        Axis("size", "Size of all weights (GB = 1024³ bytes)", "size", _gib),
    )
}

MEMORY = "memory"


def axis_of(key: str, context: int | None = None) -> Axis:
    """The axis for a key of `AXES`, or for MEMORY with `context` tokens in the KV cache."""
    if key != MEMORY:
        return AXES[key]
    tokens = context or 0

    def memory_gib(record: Record) -> float | None:
        total = memory_bytes(record.quantization, tokens)
        return None if total is None else total / GIB

    return Axis(MEMORY, f"All weights + KV cache of {tokens:,} tokens (GB = 1024³ bytes)", "memory", memory_gib)
