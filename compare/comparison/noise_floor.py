"""The noise floor of a metric that needs a reference: how far full precision is from the reference.

The same weights in another engine, or rounded as the reference's own engine rounds, are neither better nor worse than
the reference, and still differ from it. A model that differs by no more cannot be told from the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.point import Point
from compare.families import FULL_PRECISION
from compare.metrics import KLD
from compare.results.divergence import REFERENCE


@dataclass(frozen=True)
class NoiseFloor:
    """Values from `low` to `high` are noise. `sources` names the runs behind it; `points` are those that define it."""

    low: float
    high: float
    sources: tuple[str, ...]
    points: tuple[Point, ...] = ()

    def __contains__(self, value: float) -> bool:
        # rounding also takes a divergence a little below zero
        return self.low <= (abs(value) if self.low == 0 else value) <= self.high

    def __str__(self) -> str:
        return f"{self.range} ({self.source_names})"

    @property
    def range(self) -> str:
        """``0 to 0.000284``; ``1 ± 0.00013`` where noise has both signs."""
        middle = (self.low + self.high) / 2
        if abs(middle - round(middle)) <= 1e-9 * (self.high - self.low):
            return f"{middle:g} ± {self.high - middle:.3g}"
        return f"{self.low:.4g} to {self.high:.3g}"

    @property
    def source_names(self) -> str:
        """``BF16 in vllm, rounding; BF16 in llama.cpp``."""
        return "; ".join(self.sources)


def measure_noise_floor(points: Sequence[Point], metric: ChosenMetric) -> NoiseFloor | None:
    """The largest deviation from the metric's ideal value among the full-precision results; None where none is known.

    It lies on both sides of the ideal for a two-sided metric, else on the worse side. If the reference's own result is
    missing, its rounding counts as the other files repeat it.
    """
    row = metric.row
    if not row.needs_reference or row.ideal is None or metric.averaged:
        return None
    defining = sorted(filter(_defines, points), key=lambda p: (not _is_reference(p), p.record.label))
    deviations = [(abs(point.y - row.ideal), source(point)) for point in defining if point.y is not None]
    if not any(_is_reference(point) for point in defining):
        deviations += _stored_rounding(points, row.name)
    if not deviations:
        return None
    deviation = max(value for value, _ in deviations)
    low = row.ideal - deviation if row.two_sided or row.higher_is_better else row.ideal
    high = row.ideal + deviation if row.two_sided or not row.higher_is_better else row.ideal
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
    """Whether a point is full precision of the same model; an unknown size is taken for the same size."""
    if not point.comparable or point.y is None or point.record.divergence is None or point.size not in (0, None):
        return False
    return _is_reference(point) or (point.record.quantization.family == FULL_PRECISION and _same_weights(point))


def _same_weights(point: Point) -> bool:
    """Whether the model has the reference's weights, as far as its file tells: a fine-tune has full precision, too.

    Where a checksum is missing, or cannot be equal (a GGUF file holds the weights in another order), the weights are
    taken for the same; the floor's `sources` name the run.
    """
    divergence = point.record.divergence
    if divergence is None or not divergence.weights or not divergence.reference.weights:
        return True
    if (point.record.quantization.engine == "llama.cpp") != (divergence.reference.engine == "llama.cpp"):
        return True
    return divergence.weights == divergence.reference.weights


def source(point: Point) -> str:
    """``BF16 in vllm, rounding``: the run that the noise comes from."""
    label, engine = point.record.label, point.record.quantization.engine
    named = label if not engine or engine.casefold() in label.casefold() else f"{label} in {engine}"
    return f"{named}, rounding" if _is_reference(point) else named


def sources(points: list[Point]) -> str:
    """The runs that the noise comes from, joined by "and"."""
    return " and ".join(source(point) for point in points)


def _stored_rounding(points: Sequence[Point], metric: str) -> Iterator[tuple[float, str]]:
    """Deviation and source of the reference's rounding, from every comparable point whose file repeats it."""
    for point in points:
        divergence = point.record.divergence
        if not point.comparable or divergence is None or divergence.rounding is None:
            continue
        value = {KLD: divergence.rounding.kld, f"{KLD}_max": divergence.rounding.kld_max}.get(metric)
        if value is not None:
            engine = divergence.rounding.engine or divergence.reference.engine
            label = divergence.reference.label or "the reference"
            yield abs(value), f"{label}{f' in {engine}' if engine else ''}, rounding"
