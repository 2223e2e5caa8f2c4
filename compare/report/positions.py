"""The report's section on the position in the window: a picture and a table per metric that files have by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from compare.comparison.by_position import curve_of, estimates, positions_of, slope_of, slope_unit
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.plot.kind import PlotSettings
from compare.plot.pictures.by_position import ByPosition, slope_text
from compare.report import content
from compare.report.pictures import PageFigure, palette, still
from compare.text import metric_text

Say = Callable[[str], None]

MEANING = (
    "The position of a token is the number of tokens of its window that the model was given before it. A quantization "
    "whose figures get worse with the position costs more in long contexts than its mean says; the slope is per "
    "doubling of the position."
)


@dataclass
class PositionSection:
    """One metric by position. colours: those of its picture (`pictures.palette`)."""

    picture: PageFigure
    table: content.PageTable
    colours: dict[str, str]


def sections(comparisons: Iterable[Comparison], first: int, note: Say) -> list[PositionSection]:
    """A section per metric that at least one comparable model has in two bins; pictures are numbered from `first`."""
    result: list[PositionSection] = []
    by_metric = {comparison.metric: comparison for comparison in comparisons}
    for number, comparison in enumerate(by_metric.values(), first):
        points = [p for p in comparison.points if p.comparable and len(estimates(p, comparison.metric)) > 1]
        if not points:
            continue
        picture = ByPosition(comparison, PlotSettings())
        for message in picture.shown.left_out:
            note(f"{comparison.metric.label}: {message}")
        drawing = picture.shown.drawing
        result.append(
            PositionSection(
                still(picture, drawing, PlotSettings(), number, note), _table(comparison, points), palette(drawing)
            )
        )
    return result


def _table(comparison: Comparison, points: Sequence[Point]) -> content.PageTable:
    """A column per bin, as the first model has them, and the slope."""
    bins = positions_of(points[0]).bin_names()
    rows = []
    for point in points:
        curve, slope = curve_of(point, comparison.metric), slope_of(point, comparison.metric)
        assert curve is not None
        by_bin = dict(zip(positions_of(point).bin_names(), zip(curve.values, curve.errors, strict=True), strict=True))
        shown = [by_bin.get(name, (None, None)) for name in bins]
        cells = [content.Cell(metric_text(value, error), content.sort_key(value)) for value, error in shown]
        text = slope_text(comparison, point).removesuffix(slope_unit(comparison.metric)).strip()
        cells.insert(0, content.Cell(text, content.sort_key(None if slope is None else slope.value)))
        rows.append(content.PageRow(point.record.label, content.family_colour(point), cells))
    best_first = bool(comparison.metric.higher_is_better)
    heads = [content.Head("Model"), content.Head(f"Slope ({slope_unit(comparison.metric)})", True, best_first)]
    return content.PageTable(
        f"{comparison.metric.label} by position: bins with standard errors, slope with half its 95 % interval",
        [*heads, *(content.Head(name, True, best_first) for name in bins)],
        rows,
    )
