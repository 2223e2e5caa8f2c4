"""The memory that a model needs, and whether it fits: all weights, embeddings included, and the KV cache of a context.

Activations, the engine's own buffers and other programs on the GPU come on top (often 0.5 to 2 GB): they depend on
engine and settings and are not estimated here. GB are 1024³ bytes throughout, as in the "8 GB" of a graphics card.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compare.results.records import Quantization

GIB = 1024**3


@dataclass(frozen=True)
class Budget:
    """`gib` in units of 1024³ bytes, `context` in tokens of one sequence."""

    gib: float
    context: int

    def __str__(self) -> str:
        return f"{self.gib:g} GB (× 1024³ bytes) with {self.context:,} tokens of context"


class Fit(Enum):
    """Whether a model fits; UNKNOWN never counts as fitting."""

    FITS = "fits"
    TOO_LARGE = "too large"
    UNKNOWN = "unknown"


def memory_bytes(q: Quantization, context: int) -> int | None:
    """weight_bytes + context × kv_bytes_per_token; None if either is unknown."""
    if q.weight_bytes is None or q.kv_bytes_per_token is None:
        return None
    return q.weight_bytes + context * q.kv_bytes_per_token


def fit(q: Quantization, budget: Budget) -> Fit:
    """Whether a model fits; weights that alone exceed the budget are too large, whatever the cache takes."""
    limit = budget.gib * GIB
    needed = memory_bytes(q, budget.context)
    if needed is not None:
        return Fit.FITS if needed <= limit else Fit.TOO_LARGE
    return Fit.TOO_LARGE if q.weight_bytes is not None and q.weight_bytes > limit else Fit.UNKNOWN


def why_unknown(q: Quantization) -> str:
    """Why `fit` is UNKNOWN: the reason in the result file, or what the file lacks."""
    if q.weight_bytes is None:
        return "its result file does not say how large its weights are"
    reasons = [note for note in q.notes if note.startswith("kv_bytes_per_token")]
    return reasons[0] if reasons else "its result file does not say what its KV cache takes; evaluate it again"
