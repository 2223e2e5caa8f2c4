"""Reads ``configs.TASK.metadata.divergence``: how far a model is from a stored reference.

The figures depend on the reference's distributions, so those from different references are not comparable:
`compare.metrics.needs_reference` tells which metrics that applies to. Unsound values are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compare.results.values import integer, mapping, mapping_or_none, number, text

COMPARISON, REFERENCE = "comparison", "reference"  # roles
# More than a reader can distinguish; an untrusted file may have millions.
_MOST_BINS, _MOST_BUCKETS = 4096, 64
_DECADES = 300.0  # 10 to this power is still a float


@dataclass(frozen=True, slots=True)
class ReferenceIdentity:
    """The stored reference. `id` is equal only for equal distributions, and empty where a file lacks it.

    weights: a checksum over its weight files.
    """

    id: str = ""
    label: str = ""
    engine: str = ""
    engine_version: str = ""
    dtype: str = ""
    mode: str = ""
    weights: str = ""

    def describe(self) -> str:
        """``BF16 in vllm 0.26.0 (bfloat16), 1a2b3c4d``."""
        engine = " ".join(filter(None, (self.engine, self.engine_version)))
        dtype = f" ({self.dtype})" if self.dtype else ""
        in_engine = f" in {engine}" if engine else ""
        short = f", {self.id[:8]}" if self.id else ""
        return f"{self.label or 'unnamed'}{in_engine}{dtype}{short}"


@dataclass(frozen=True, slots=True)
class Rounding:
    """D_KL(reference's definition ‖ its own engine's rounded logits), measured when the reference was stored."""

    kld: float | None = None
    kld_max: float | None = None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Tokens by log₁₀ of their divergence: `counts` between adjacent `edges`; `below` and `above` lie outside."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    @property
    def total(self) -> int:
        return sum(self.counts) + self.below + self.above

    def densities(self) -> list[float]:
        """The share of all tokens per decade, one value per bin, which does not depend on the bin width."""
        total = self.total
        return [n / total / (b - a) for n, (a, b) in zip(self.counts, pairwise(self.edges), strict=True)]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The tokens where the reference's largest probability is between `low` and `high`."""

    low: float
    high: float
    tokens: int
    kld: float | None
    kld_stderr: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """One run against one reference. What a file lacks, or gives in an unsound form, is empty or None.

    quantiles: percent and nats, in order. weights: a checksum over the measured model's weight files.
    """

    role: str = ""
    weights: str = ""
    reference: ReferenceIdentity = ReferenceIdentity()
    rounding: Rounding | None = None
    tokens: int | None = None
    quantiles: tuple[tuple[float, float], ...] = ()
    histogram: Histogram | None = None
    buckets: tuple[Bucket, ...] = ()

    def quantile(self, percent: float) -> float | None:
        return dict(self.quantiles).get(percent)


def read_divergence(metadata: dict[str, Any]) -> Divergence | None:
    """The divergence in a task's metadata; None where there is none. Never raises."""
    block = mapping_or_none(metadata.get("divergence"))
    if block is None:
        return None
    role, rounding = text(block.get("role")), mapping_or_none(block.get("rounding"))
    return Divergence(
        role=role if role in (COMPARISON, REFERENCE) else "",
        weights=text(block.get("weights_sha256")),
        reference=_reference(mapping(block, "reference")),
        rounding=None if rounding is None else _rounding(rounding),
        tokens=integer(block.get("tokens")),
        quantiles=_quantiles(mapping(block, "quantiles")),
        histogram=_histogram(mapping(block, "histogram")),
        buckets=tuple(_buckets(block.get("by_confidence"))),
    )


def _reference(block: dict[str, Any]) -> ReferenceIdentity:
    names = ("id", "label", "engine", "engine_version", "dtype", "mode")
    return ReferenceIdentity(
        **{name: text(block.get(name)) for name in names}, weights=text(block.get("weights_sha256"))
    )


def _rounding(block: dict[str, Any]) -> Rounding:
    return Rounding(number(block.get("kld")), number(block.get("kld_max")), text(block.get("engine")))


def _quantiles(block: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    """All quantiles in order, or none if one is unsound or they do not rise with the percentage."""
    quantiles = []
    for key, value in block.items():
        try:
            percent = number(float(key))
        except ValueError:
            return ()
        nats = number(value)
        if percent is None or not 0 < percent < 100 or nats is None:
            return ()
        quantiles.append((percent, nats))
    quantiles.sort()
    rising = all(p < q and a <= b for (p, a), (q, b) in pairwise(quantiles))
    return tuple(quantiles) if rising else ()


def _histogram(block: dict[str, Any]) -> Histogram | None:
    edges, counts = block.get("log10_edges"), block.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list):
        return None
    if not 2 <= len(edges) <= _MOST_BINS or len(counts) != len(edges) - 1:
        return None
    places = [number(edge) for edge in edges]
    numbers = [integer(n) for n in (*counts, block.get("below"), block.get("above"))]
    sound_places = [place for place in places if place is not None and abs(place) <= _DECADES]
    sound_numbers = [n for n in numbers if n is not None and n < 2**63]
    if len(sound_places) < len(places) or len(sound_numbers) < len(numbers) or not sum(sound_numbers):
        return None
    if any(b - a < 1e-6 for a, b in pairwise(sound_places)):
        return None
    *inside, below, above = sound_numbers
    return Histogram(tuple(sound_places), tuple(inside), below, above)


def _buckets(block: object) -> Iterator[Bucket]:
    for row in block if isinstance(block, list) and len(block) <= _MOST_BUCKETS else ():
        if not isinstance(row, dict):
            continue
        low, high, tokens = number(row.get("from")), number(row.get("to")), integer(row.get("tokens"))
        if low is None or high is None or tokens is None or not 0 <= low < high <= 1:
            continue
        stderr = number(row.get("kld_stderr"))
        yield Bucket(
            low, high, tokens, number(row.get("kld")), stderr if stderr is None or stderr >= 0 else None,
            number(row.get("top1_agreement")),
        )  # fmt: skip
