"""``configs.TASK.metadata.divergence``: how far a model is from a stored reference, as far as a file says it soundly.

The figures come of the reference's distributions, and those of another reference mean another thing: `from_reference`
names the metrics for which it has to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compare.results.values import mapping, mapping_or_none, number, text, whole

COMPARISON, REFERENCE = "comparison", "reference"  # roles
# Bins and buckets beyond any that a reader could tell apart; a file from a stranger may hold millions.
_MOST_BINS, _MOST_BUCKETS = 4096, 64
_DECADES = 300.0  # 10 to this power is still a float


@dataclass(frozen=True, slots=True)
class ReferenceIdentity:
    """The stored reference. `id` is equal for equal distributions only; empty where a file does not say it."""

    id: str = ""
    label: str = ""
    engine: str = ""
    engine_version: str = ""
    dtype: str = ""
    mode: str = ""
    weights: str = ""  # a sum over its weight files

    def describe(self) -> str:
        """``BF16 in vllm 0.26.0 (bfloat16), 1a2b3c4d``."""
        engine = " ".join(filter(None, (self.engine, self.engine_version)))
        dtype = f" ({self.dtype})" if self.dtype else ""
        where = f" in {engine}" if engine else ""
        short = f", {self.id[:8]}" if self.id else ""
        return f"{self.label or 'unnamed'}{where}{dtype}{short}"


@dataclass(frozen=True, slots=True)
class Rounding:
    """D_KL(reference's definition ‖ its own engine's rounded logits), measured when the reference was stored."""

    kld: float | None = None
    kld_max: float | None = None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Tokens by log₁₀ of their divergence: `counts` between neighbours of `edges`, and those outside all."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    @property
    def total(self) -> int:
        return sum(self.counts) + self.below + self.above

    def densities(self) -> list[float]:
        """Share of all tokens per decade, a value a bin: independent of how wide the bins are."""
        total = self.total
        return [n / total / (b - a) for n, (a, b) in zip(self.counts, pairwise(self.edges), strict=True)]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens whose most likely successor has, in the reference, a probability from `low` to `high`."""

    low: float
    high: float
    tokens: int
    kld: float | None
    kld_stderr: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """One run against one reference. What a file does not say soundly is empty or None.

    `quantiles`: percent and nats, in order. `weights`: a sum over the measured model's weight files.
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
    """What a task's metadata says of a divergence; None where it says nothing. Never raises."""
    said = mapping_or_none(metadata.get("divergence"))
    if said is None:
        return None
    role, rounding = text(said.get("role")), mapping_or_none(said.get("rounding"))
    return Divergence(
        role=role if role in (COMPARISON, REFERENCE) else "",
        weights=text(said.get("weights_sha256")),
        reference=_reference(mapping(said, "reference")),
        rounding=None if rounding is None else _rounding(rounding),
        tokens=whole(said.get("tokens")),
        quantiles=_quantiles(mapping(said, "quantiles")),
        histogram=_histogram(mapping(said, "histogram")),
        buckets=tuple(_buckets(said.get("by_confidence"))),
    )


def _reference(said: dict[str, Any]) -> ReferenceIdentity:
    names = ("id", "label", "engine", "engine_version", "dtype", "mode")
    return ReferenceIdentity(**{name: text(said.get(name)) for name in names}, weights=text(said.get("weights_sha256")))


def _rounding(said: dict[str, Any]) -> Rounding:
    return Rounding(number(said.get("kld")), number(said.get("kld_max")), text(said.get("engine")))


def _quantiles(said: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    """All of them in order, or none: a list that does not rise is no list of quantiles."""
    found = []
    for key, value in said.items():
        try:
            percent = number(float(key))
        except ValueError:
            return ()
        nats = number(value)
        if percent is None or not 0 < percent < 100 or nats is None:
            return ()
        found.append((percent, nats))
    found.sort()
    rising = all(p < q and a <= b for (p, a), (q, b) in pairwise(found))
    return tuple(found) if rising else ()


def _histogram(said: dict[str, Any]) -> Histogram | None:
    edges, counts = said.get("log10_edges"), said.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list):
        return None
    if not 2 <= len(edges) <= _MOST_BINS or len(counts) != len(edges) - 1:
        return None
    places = [number(edge) for edge in edges]
    numbers = [whole(n) for n in (*counts, said.get("below"), said.get("above"))]
    sound_places = [place for place in places if place is not None and abs(place) <= _DECADES]
    sound_numbers = [n for n in numbers if n is not None and n < 2**63]
    if len(sound_places) < len(places) or len(sound_numbers) < len(numbers) or not sum(sound_numbers):
        return None
    if any(b - a < 1e-6 for a, b in pairwise(sound_places)):
        return None
    *inside, below, above = sound_numbers
    return Histogram(tuple(sound_places), tuple(inside), below, above)


def _buckets(said: object) -> Iterator[Bucket]:
    for row in said if isinstance(said, list) and len(said) <= _MOST_BUCKETS else ():
        if not isinstance(row, dict):
            continue
        low, high, tokens = number(row.get("from")), number(row.get("to")), whole(row.get("tokens"))
        if low is None or high is None or tokens is None or not 0 <= low < high <= 1:
            continue
        stderr = number(row.get("kld_stderr"))
        yield Bucket(
            low, high, tokens, number(row.get("kld")), stderr if stderr is None or stderr >= 0 else None,
            number(row.get("top1_agreement")),
        )  # fmt: skip
