"""A metric by the position in the window: a point's curve, its 95 % intervals, and the slope per doubling."""

from __future__ import annotations

from dataclasses import dataclass

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.point import Point
from compare.comparison.significance import CONFIDENCE, MIN_BLOCKS
from compare.metrics import exp_of_mean
from compare.results.positions import Curve, Positions


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


def _half_width(error: float | None, blocks: int) -> float | None:
    if error is None or blocks < MIN_BLOCKS:
        return None
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, blocks - 1)) * error
