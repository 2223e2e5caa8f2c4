"""The noise floor of a figure that comes of a reference: how far full precision is from itself.

The same weights in another engine, or rounded as the reference's own engine rounds, are no better and no worse than the
reference; still they differ from it. A model that differs by no more cannot be told from the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compare.comparison.metric_choice import MetricChoice
from compare.comparison.point import Point
from compare.families import FULL_PRECISION
from compare.metrics import KLD, from_reference, ideal
from compare.results.divergence import REFERENCE


@dataclass(frozen=True)
class NoiseFloor:
    """From `low` to `high` lies noise. `sources` says whose; `points` are those that define it."""

    low: float
    high: float
    sources: tuple[str, ...]
    points: tuple[Point, ...] = ()

    def __contains__(self, value: float) -> bool:
        # Rounding takes a divergence a little below zero, too
        return self.low <= (abs(value) if self.low == 0 else value) <= self.high

    def __str__(self) -> str:
        return f"{self.range} ({self.words})"

    @property
    def range(self) -> str:
        """``0 to 0.000284``; ``1 ± 0.00013`` where noise goes both ways."""
        middle = (self.low + self.high) / 2
        if abs(middle - round(middle)) <= 1e-9 * (self.high - self.low):
            return f"{middle:g} ± {self.high - middle:.3g}"
        return f"{self.low:.4g} to {self.high:.3g}"

    @property
    def words(self) -> str:
        """``BF16 in vllm, rounding; BF16 in llama.cpp``."""
        return "; ".join(self.sources)


def measure_noise_floor(points: Sequence[Point], metric: MetricChoice) -> NoiseFloor | None:
    """The largest deviation from `ideal` among the full-precision results; None where nothing tells it.

    Signed figures (mean_delta_p, ppl_ratio) get it on both sides. Where no result of the reference itself is there, its
    rounding counts as the others' files repeat it.
    """
    name = metric.metric
    if not from_reference(name) or metric.averaged:
        return None
    defining = sorted(filter(_defines, points), key=lambda p: (not _is_reference(p), p.record.label))
    deviations = [(abs(point.y - ideal(name)), source(point)) for point in defining if point.y is not None]
    if not any(_is_reference(point) for point in defining):
        deviations += _stored_rounding(points, name)
    if not deviations:
        return None
    deviation, best = max(value for value, _ in deviations), ideal(name)
    low = best - deviation if name in ("top1_agreement", "mean_delta_p", "ppl_ratio") else best
    high = best if name == "top1_agreement" else best + deviation
    return NoiseFloor(low, high, tuple(dict.fromkeys(source for _, source in deviations)), tuple(defining))


def within(points: Sequence[Point], floor: NoiseFloor | None) -> list[Point]:
    """The models that differ from the reference by no more than full precision does."""
    if floor is None:
        return []
    own = {id(point) for point in floor.points}
    return [p for p in points if p.comparable and id(p) not in own and p.y is not None and p.y in floor]


def _is_reference(point: Point) -> bool:
    return point.record.divergence is not None and point.record.divergence.role == REFERENCE


def _defines(point: Point) -> bool:
    """A model of another size in full precision is no noise; one of unknown size is taken for the same."""
    if not point.comparable or point.y is None or point.record.divergence is None or point.size not in (0, None):
        return False
    return _is_reference(point) or (point.record.quantization.family == FULL_PRECISION and _same_weights(point))


def _same_weights(point: Point) -> bool:
    """Whether the model is the reference's own, as far as its file tells: a fine-tune has full precision, too.

    Where a sum is missing, or cannot be the same (a GGUF file holds the weights in another order), it is taken for the
    same; the floor's words name whose noise it is.
    """
    found = point.record.divergence
    if found is None or not found.weights or not found.reference.weights:
        return True
    if (point.record.quantization.engine == "llama.cpp") != (found.reference.engine == "llama.cpp"):
        return True
    return found.weights == found.reference.weights


def source(point: Point) -> str:
    """``BF16 in vllm, rounding``: whose noise it is."""
    label, engine = point.record.label, point.record.quantization.engine
    named = label if not engine or engine.casefold() in label.casefold() else f"{label} in {engine}"
    return f"{named}, rounding" if _is_reference(point) else named


def sources(points: list[Point]) -> str:
    return " and ".join(source(point) for point in points)


def _stored_rounding(points: Sequence[Point], metric: str) -> Iterator[tuple[float, str]]:
    for point in points:
        found = point.record.divergence
        if not point.comparable or found is None or found.rounding is None:
            continue
        figures = {KLD: found.rounding.kld, "kld_max": found.rounding.kld_max}
        value = figures.get(metric)
        if value is not None:
            engine = found.rounding.engine or found.reference.engine
            yield abs(value), f"{found.reference.label or 'the reference'}{f' in {engine}' if engine else ''}, rounding"
