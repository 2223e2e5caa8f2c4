"""The memory that a model needs, and whether it fits: all loaded weights, embeddings included, and the KV cache.

Activations, the engine's own buffers and other programs on the GPU come on top (often 0.5 to 2 GB): they depend on
engine and settings and are not estimated here. GB are 1024³ bytes throughout, as in the "8 GB" of a graphics card.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compare.results.records import Quantization

GIB = 1024**3
_ANY = 2**40  # tokens; no context is as long


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


@dataclass(frozen=True)
class Memory:
    """Bytes that a model needs: its loaded weights, and the cache of one sequence.

    exact: False if the cache takes at most `cache`.
    """

    weights: int
    cache: int
    exact: bool

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.cache


def loaded_bytes(q: Quantization) -> int | None:
    """The bytes of all weights but those of draft layers, which no engine loads; None if unknown."""
    return None if q.weight_bytes is None else max(q.weight_bytes - q.draft_bytes, 0)


def memory(q: Quantization, context: int) -> Memory | None:
    """The bytes that a model needs with `context` tokens; None if weights or cache are unknown.

    Result files of older versions have bytes per token alone.
    """
    weights = loaded_bytes(q)
    if weights is None:
        return None
    if q.kv_cache is not None:
        return Memory(weights, q.kv_cache.bytes_at(context), not q.kv_cache.upper_bound)
    if q.kv_bytes_per_token is not None:
        return Memory(weights, context * q.kv_bytes_per_token, True)
    return None


def memory_bytes(q: Quantization, context: int) -> int | None:
    """The bytes that a model needs with `context` tokens; None if unknown, or known as an upper bound only."""
    needed = memory(q, context)
    return needed.total if needed is not None and needed.exact else None


def fit(q: Quantization, budget: Budget) -> Fit:
    """Whether a model fits; weights that alone exceed the budget are too large, whatever the cache takes.

    A cache that is known as an upper bound only can show that a model fits, not that it does not.
    """
    limit, needed, weights = budget.gib * GIB, memory(q, budget.context), loaded_bytes(q)
    if needed is not None and needed.total <= limit:
        return Fit.FITS
    if (needed is not None and needed.exact) or (weights is not None and weights > limit):
        return Fit.TOO_LARGE
    return Fit.UNKNOWN


@dataclass(frozen=True)
class Room:
    """How many tokens of cache fit beside the weights. tokens: None if the cache stops growing: any number fits.

    exact: False if at least so many fit.
    """

    tokens: int | None
    exact: bool = True

    @property
    def kind(self) -> str:
        """``exact``, ``at least``, or ``any`` number of tokens."""
        return "any" if self.tokens is None else "exact" if self.exact else "at least"

    def __str__(self) -> str:
        if self.tokens is None:
            return "any"
        return f"{self.tokens:,}" if self.exact else f"at least {self.tokens:,}"


def longest_context(q: Quantization, gib: float) -> Room | None:
    """The longest context whose cache fits beside the weights into `gib` × 1024³ bytes; None if unknown.

    Of memory alone: a model may support fewer tokens. Bytes never fall with the context, so that halving finds it.
    """
    limit, weights = gib * GIB, loaded_bytes(q)
    empty, endless = memory(q, 0), memory(q, _ANY)
    if weights is not None and weights > limit:
        return Room(0)
    if empty is None or endless is None:
        return None
    if endless.total <= limit:
        return Room(None, endless.exact)
    if empty.total > limit:
        return Room(0, empty.exact)
    low, high = 0, _ANY  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        needed = memory(q, middle)
        low, high = (middle, high) if needed is not None and needed.total <= limit else (low, middle)
    return Room(low, empty.exact)


def why_unknown(q: Quantization) -> str:
    """Why `fit` is UNKNOWN: the reason in the result file, or what the file lacks."""
    if q.weight_bytes is None:
        return "its result file does not say how large its weights are"
    reasons = [note for note in q.notes if note.startswith("kv_bytes_per_token")]
    return reasons[0] if reasons else "its result file does not say what its KV cache takes; evaluate it again"
