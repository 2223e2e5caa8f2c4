"""A metric over the position in the window: a line per model, positions across on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from compare.comparison.by_position import Estimate, estimates, positions_of, slope_of, slope_unit
from compare.comparison.comparison import Comparison
from compare.comparison.noise_floor import source
from compare.comparison.point import Point
from compare.comparison.significance import MIN_BLOCKS
from compare.plot.axes import frame, log_ticks
from compare.plot.captions import Texts, mixed, subtitle, y_label
from compare.plot.distributions import Distributions, by_position
from compare.plot.header import draw_texts, make_room_for_ticks
from compare.plot.kind import DistributionKind, PlotSettings, Say
from compare.plot.lines import beside_legend, draw_legend, name_room, strokes
from compare.text import shorten, signed_text

_APART, _MOST_APART = 0.045, 0.4  # log2 of the position: between the bars of two models, and of all of them


class ByPosition(DistributionKind):
    """A line per model; it needs no size."""

    metrics = ()
    excluded_flags = (*DistributionKind.excluded_flags, "--x")

    @staticmethod
    def select(comparison: Comparison) -> Distributions:
        return by_position(comparison)

    def default_title(self) -> str:
        return f"{self.comparison.metric.row.title} by position in the window"

    def describe(self) -> str:
        slopes = "; ".join(f"{p.record.label}: {slope_text(self.comparison, p)}" for p in self.shown.points)
        return f"{self.title}. {slopes}."

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        _draw(figure, self, settings)


KIND = ByPosition


def slope_text(comparison: Comparison, point: Point) -> str:
    """``+0.0012 ± 0.0003 nats per doubling``: a point's slope with half its 95 % interval."""
    slope = slope_of(point, comparison.metric)
    if slope is None:
        return "slope unknown"
    bounds = "" if slope.half_width is None else f" ± {signed_text(slope.half_width, slope.half_width)[1:]}"
    return f"{signed_text(slope.value, slope.half_width)}{bounds} {slope_unit(comparison.metric)}"


def _places(point: Point) -> list[float]:
    """The geometric middle of each bin."""
    return [math.sqrt(a * (b - 1)) for a, b in pairwise(positions_of(point).edges)]


def _draw(figure: Figure, picture: ByPosition, settings: PlotSettings) -> None:
    comparison, models, theme = picture.comparison, picture.shown, settings.theme
    metric = comparison.metric
    shown = [value for p in models.points + models.noise_floor for value in estimates(p, metric) if value is not None]
    log_y = metric.row.log_axis if settings.log_y is None else settings.log_y
    log_y = log_y and any(estimate.value > 0 for estimate in shown)
    layout = draw_texts(figure, Texts(picture.title, subtitle(comparison), _caption(comparison, models)), [], theme)
    box = beside_legend(layout.axes_box)
    ax: Any = figure.add_axes(box)
    frame(ax, "Position: tokens of the window before the predicted one", y_label(comparison))
    handles: list[Any] = []
    names: list[str] = []
    room = name_room(models)
    gap = min(_APART, _MOST_APART / max(len(models.points), 1))
    for rank, (point, stroke) in enumerate(zip(models.points, strokes(models, theme), strict=True)):
        shift = 2 ** (gap * (rank - (len(models.points) - 1) / 2))
        xs = [x * shift for x in _places(point)]
        ys = [_drawn(estimate, log_y) for estimate in estimates(point, metric)]
        ax.plot(xs, ys, **stroke, linewidth=1.7, marker="o", markersize=3.6, zorder=3)
        _bars(ax, xs, estimates(point, metric), stroke, log_y)
        handles.append(Line2D([], [], **stroke, linewidth=1.9))
        names.append(f"{shorten(point.record.label, room)}\n{slope_text(comparison, point)}")
    for number, point in enumerate(models.noise_floor):
        alpha = 0.13 + 0.12 * (number % 3)
        ys = [_drawn(estimate, log_y) for estimate in estimates(point, metric)]
        bottom = 1e-300 if log_y else comparison.metric.row.ideal or 0.0
        ax.fill_between(_places(point), bottom, ys, color=theme.soft, alpha=alpha, linewidth=0, zorder=1)
        handles.append(Patch(facecolor=theme.soft, alpha=alpha + 0.06))
        names.append(shorten(source(point), room))
    _limits(ax, models, shown, log_y)
    make_room_for_ticks(figure, ax, box)
    draw_legend(figure, layout.axes_box, handles, names)


def _drawn(estimate: Estimate | None, log_y: bool) -> float:
    """The height of an estimate; NaN, a gap in the line, where it has none."""
    return math.nan if estimate is None or (log_y and estimate.value <= 0) else estimate.value


def _bars(ax: Any, xs: Sequence[float], values: Sequence[Estimate | None], stroke: dict[str, Any], log_y: bool) -> None:
    for x, estimate in zip(xs, values, strict=True):
        if estimate is None or not estimate.half_width or math.isnan(_drawn(estimate, log_y)):
            continue
        low, high = estimate.value - estimate.half_width, estimate.value + estimate.half_width
        low = max(low, estimate.value / 100) if log_y else low
        ax.plot([x, x], [low, high], color=stroke["color"], alpha=0.45, linewidth=1.4, zorder=2.5)


def _limits(ax: Any, models: Distributions, shown: Sequence[Estimate], log_y: bool) -> None:
    edges = sorted({edge for point in models.points for edge in positions_of(point).edges})
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(min(_places(p)) for p in models.points) / 1.4, max(max(_places(p)) for p in models.points) * 1.4)
    ticks = [2**i for i in range(28) if edges[0] <= 2**i <= edges[-1]]
    ax.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 10)]))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    )
    ax.xaxis.set_minor_locator(NullLocator())
    values = [e.value for e in shown if not log_y or e.value > 0]
    low, high = min(values), max(values)
    if log_y:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.6, high * 1.6)
        log_ticks(ax, high / low * 2.56)
        return
    tops = [e.value + (e.half_width or 0.0) for e in shown]
    bottoms = [e.value - (e.half_width or 0.0) for e in shown]
    spread = high - low or abs(high) * 0.05 or 1.0
    ax.set_ylim(max(min(bottoms), low - spread) - 0.05 * spread, min(max(tops), high + spread) + 0.05 * spread)


def _caption(comparison: Comparison, models: Distributions) -> list[str]:
    blocks = {positions_of(point).blocks for point in models.points}
    fewest = min(blocks, default=0)
    lines = [
        "Points: means over positions 1 to 15, 16 to 31, and so on, each range twice as wide as the one before. "
        "Slope: least-squares line of all tokens over log2(position)."
    ]
    if fewest >= MIN_BLOCKS:
        number = " or ".join(str(n) for n in sorted(blocks))
        lines += [
            f"Bars and ±: 95 % intervals, t over {number} blocks of windows. All models are scored on the same tokens, "
            "so differences are surer than the bars suggest."
        ]
    else:
        lines.append(f"No intervals: {fewest} independent blocks of windows, fewer than {MIN_BLOCKS}.")
    if models.noise_floor:
        lines.append("Shaded: full precision, whose difference from the reference is noise.")
    return lines + mixed(comparison)
