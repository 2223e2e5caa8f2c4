"""A metric by the position in the window: curves with 95 % intervals, slopes per doubling, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.labels import find_label
from compare.comparison.point import Point
from compare.comparison.significance import CONFIDENCE, MIN_BLOCKS, PairedDifference, bootstrap
from compare.metrics import exp_of_mean, formula_of, mean
from compare.results.positions import Curve, Positions

if TYPE_CHECKING:
    from compare.metrics import Array, Formula


@dataclass(frozen=True)
class Estimate:
    """A value with half the width of its 95 % interval, None where there are fewer than five blocks of windows."""

    value: float
    half_width: float | None = None

    @property
    def apart_from_zero(self) -> bool | None:
        """Whether zero lies outside the interval; None without one."""
        return None if self.half_width is None else abs(self.value) > self.half_width


def curve_of(point: Point, metric: ChosenMetric) -> Curve | None:
    """The metric's curve in a point's result file; None where it has none, or no bin has a value."""
    positions = point.record.positions
    if positions is None or metric.averaged or metric.filter_name not in ("", "none"):
        return None
    curve = positions.curves.get(metric.metric)
    return curve if curve is not None and any(value is not None for value in curve.values) else None


def positions_of(point: Point) -> Positions:
    """The bins of a point that has a curve."""
    assert point.record.positions is not None
    return point.record.positions


def estimates(point: Point, metric: ChosenMetric) -> list[Estimate | None]:
    """Each bin's value with its interval, value ± t × standard error with Student's t at blocks − 1 degrees of freedom.

    None for a bin without a value; empty where the point has no curve.
    """
    curve = curve_of(point, metric)
    if curve is None:
        return []
    blocks = positions_of(point).blocks
    return [
        None if value is None else Estimate(value, _half_width(error, blocks))
        for value, error in zip(curve.values, curve.errors, strict=True)
    ]


def slope_of(point: Point, metric: ChosenMetric) -> Estimate | None:
    """The slope per doubling of the position with its interval; None where it is unknown."""
    curve = curve_of(point, metric)
    if curve is None or curve.slope is None:
        return None
    return Estimate(curve.slope, _half_width(curve.slope_error, positions_of(point).blocks))


def slope_unit(metric: ChosenMetric) -> str:
    """``nats per doubling``: the unit of a slope."""
    row = metric.row
    unit = "nats" if row.formula is exp_of_mean else row.unit  # the slope of the mean, of which the metric is exp
    return f"{unit} per doubling" if unit else "per doubling"


@dataclass(frozen=True)
class PositionPair:
    """A model − a baseline on the same windows: at each position bin, and in the slope; None where it is unknown."""

    bins: tuple[PairedDifference | None, ...]
    slope: PairedDifference | None


@dataclass
class PositionPairs:
    """The pairs of a comparison by `id` of their point, with the baseline's label."""

    label: str
    pairs: dict[int, PositionPair] = field(default_factory=dict)


def measure_position_pairs(points: Sequence[Point], metric: ChosenMetric, label: str) -> PositionPairs:
    """Pairs every comparable model with the baseline called `label`, where both files have sums by block.

    Raises CompareError if no model has that label.
    """
    found = find_label([point.record.label for point in points], label, "--versus", f" of {metric.label}")
    baseline = next(point for point in points if point.record.label == found)
    pairs = {id(p): pair for p in points if p is not baseline and (pair := _pair(p, baseline, metric)) is not None}
    return PositionPairs(found, pairs)


def _pair(point: Point, baseline: Point, metric: ChosenMetric) -> PositionPair | None:
    ours, theirs = curve_of(point, metric), curve_of(baseline, metric)
    if ours is None or theirs is None or metric.row.formula is None:
        return None
    if point.record.comparability(metric.metric) != baseline.record.comparability(metric.metric):
        return None
    bins, others = positions_of(point), positions_of(baseline)
    if (bins.edges, bins.block_tokens) != (others.edges, others.block_tokens):
        return None
    if not all((bins.block_tokens, bins.block_x, ours.totals, theirs.totals, ours.products, theirs.products)):
        return None
    import numpy as np

    tokens, x = np.array(bins.block_tokens), np.array(bins.block_x)
    totals, products = (np.array([getattr(c, name) for c in (ours, theirs)]) for name in ("totals", "products"))
    formula = formula_of(metric.metric, rolling=False)
    at_bins = [_difference(totals[..., i], tokens[:, i], formula) for i in range(tokens.shape[1])]
    # The least-squares slope is Σ (x − mean x) y / Σ (x − mean x)²: a ratio of sums over blocks
    n = tokens.sum(axis=1)
    middle = x[:, 0].sum() / n.sum()
    spread = x[:, 1] - 2 * middle * x[:, 0] + middle**2 * n
    slope = _difference(products - middle * totals.sum(axis=2), spread, mean)
    return PositionPair(tuple(at_bins), slope)


def _difference(totals: Array, counts: Array, formula: Formula) -> PairedDifference | None:
    """The paired difference; totals: [2, blocks], of the model and the baseline. counts: [blocks]."""
    import numpy as np

    ours, theirs = (np.stack([total, counts], axis=1) for total in totals)
    try:
        return bootstrap(ours, theirs, formula)
    except ValueError:  # a resample without tokens, as in a bin that one block alone has
        return None


def _half_width(error: float | None, blocks: int) -> float | None:
    if error is None or blocks < MIN_BLOCKS:
        return None
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, blocks - 1)) * error
