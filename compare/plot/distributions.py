"""Which models a picture of distributions shows: boxes from quantiles, lines from histograms and over positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compare.comparison.by_position import curve_of
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.plot.series import Drawing, Series, drawing_of
from compare.results.divergence import Divergence, Histogram
from compare.text import and_more

NEEDED = (5.0, 25.0, 50.0, 75.0, 95.0)  # percentiles of a box
FAR = 99.0  # the percentile that is marked by a stroke, where the record has it
LOWEST = 1e-10  # nats: far below what float32 sums resolve; a logarithmic axis ends there at the latest
MOST_LINES, MOST_BOXES = 24, 60


@dataclass
class Distributions:
    """`drawing` has the models by family; `noise_floor` those of full precision; `left_out` messages for the user."""

    drawing: Drawing
    noise_floor: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        return self.drawing.points

    @property
    def pairs(self) -> list[tuple[Point, Series]]:
        return [(point, series) for series in self.drawing.series for point in series.points]


def boxes(comparison: Comparison) -> Distributions:
    """Models with quantiles and a place on x."""

    def lacks(point: Point, divergence: Divergence) -> str:
        if any(divergence.quantile(percent) is None for percent in NEEDED):
            return f"its result file holds no sound quantiles ({point.record.file})"
        return ""

    return _arranged(comparison, _with_divergence(lacks), MOST_BOXES, with_x=True)


def histograms(comparison: Comparison) -> Distributions:
    """Models with a histogram."""

    def lacks(point: Point, divergence: Divergence) -> str:
        return (
            ""
            if divergence.histogram is not None
            else f"its result file holds no sound histogram ({point.record.file})"
        )

    return _arranged(comparison, _with_divergence(lacks), MOST_LINES, with_x=False)


def by_position(comparison: Comparison) -> Distributions:
    """Models with figures by position for the comparison's metric."""

    def lacks(point: Point) -> str:
        if curve_of(point, comparison.metric) is not None:
            return ""
        return f"its result file holds no {comparison.metric.short} by position ({point.record.file})"

    return _arranged(comparison, lacks, MOST_LINES, with_x=False)


def _with_divergence(lacks: Callable[[Point, Divergence], str]) -> Callable[[Point], str]:
    """What a point lacks, first of all its divergence."""

    def reason(point: Point) -> str:
        if point.record.divergence is None:
            return f"its result file holds no divergence ({point.record.file})"
        return lacks(point, point.record.divergence)

    return reason


def _arranged(comparison: Comparison, lacks: Callable[[Point], str], most: int, with_x: bool) -> Distributions:
    defining = {id(point) for point in comparison.noise_floor.points} if comparison.noise_floor is not None else set()
    shown: list[Point] = []
    floor: list[Point] = []
    left_out: list[str] = []
    for point in comparison.points:
        reason = lacks(point) if point.comparable else "other tokens or another reference"
        if not reason and id(point) not in defining and with_x and point.x is None:
            reason = f"its result file does not say {comparison.axis.short} ({comparison.axis.key})"
        if reason:
            left_out.append(f"not drawn: {point.record.label}: {reason}")
        else:
            (floor if id(point) in defining else shown).append(point)
    if not shown:  # full precision only: it is what is compared
        shown, floor = [point for point in floor if point.x is not None or not with_x], []
    if len(shown) > most:
        names = and_more([point.record.label for point in shown[most:]], 50)
        left_out.append(f"not drawn, there is room for {most} models (--mask chooses others): {names}")
        shown = shown[:most]
    drawing = drawing_of(shown)
    for series in drawing.series:
        series.joined = False
    return Distributions(drawing, floor, left_out + drawing.left_out)


def quantile(point: Point, percent: float) -> float | None:
    """The quantile of a point that `boxes` selected, in nats."""
    return point.record.divergence.quantile(percent) if point.record.divergence is not None else None


def histogram(point: Point) -> Histogram:
    """The histogram of a point that `histograms` selected."""
    assert point.record.divergence is not None
    assert point.record.divergence.histogram is not None
    return point.record.divergence.histogram
