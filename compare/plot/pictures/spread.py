"""How each model's divergence is spread over the tokens: a box per model, from the quantiles of its result file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator

from compare.comparison.comparison import Comparison
from compare.comparison.noise_floor import sources
from compare.comparison.point import Point
from compare.plot import style
from compare.plot.axes import fit_x, frame, log_ticks
from compare.plot.captions import Texts, mixed, point_label, subtitle
from compare.plot.distributions import FAR, LOWEST, Distributions, boxes, quantile
from compare.plot.header import draw_texts, make_room_for_ticks, marker_size
from compare.plot.kind import DistributionKind, PlotSettings, Say
from compare.plot.labels import readable
from compare.text import shorten

_NAME = "KL divergence of a token"
_BOX, _LABEL_LENGTH = 11.0, 22  # points across; characters
_FEET = 0.045  # room below the boxes, as a share of the range shown
_FOOT = 0.028  # of the axes' height: where strokes lead from a box to its true place


class Spread(DistributionKind):
    """A box per model at its size."""

    @staticmethod
    def select(comparison: Comparison) -> Distributions:
        return boxes(comparison)

    def default_title(self) -> str:
        return f"{_NAME} by {self.comparison.axis.short}"

    def describe(self) -> str:
        medians = "; ".join(f"{p.record.label}: median {quantile(p, 50):.3g}" for p in self.shown.points)
        return f"{self.title}. {medians}."

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        log_y = settings.log_y is not False  # divergences span decades
        _draw(figure, self.comparison, self.shown, self.title, settings.theme, log_y)


KIND = Spread


def lowest(models: Distributions, log_y: bool) -> tuple[float, list[Point]]:
    """The lowest value of the axis, and the models whose whiskers continue below it."""
    lows = [quantile(point, 5.0) or 0.0 for point in models.points]
    if not log_y:
        return min(0.0, *lows), []
    inner = [
        value for p in models.points for q in (5.0, 25.0, 50.0, 75.0, 95.0) if (value := quantile(p, q) or 0) >= LOWEST
    ]
    return min(inner, default=LOWEST), [point for point, low in zip(models.points, lows, strict=True) if low < LOWEST]


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to `places` (sum of squares), in their order, at least `gap` apart, from `low` to `high`.

    Isotonic regression of place − i × gap by pooling adjacent violators (Barlow et al. 1972). A gap that does not
    fit is made smaller.
    """
    if not places:
        return []
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    pools: list[tuple[float, int]] = []  # mean, size
    for rank, index in enumerate(order):
        mean, size = places[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (other * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    level = [min(max(mean, low), high - (len(places) - 1) * gap) for mean, size in pools for _ in range(size)]
    separated = [0.0] * len(places)
    for rank, index in enumerate(order):
        separated[index] = level[rank] + rank * gap
    return separated


def _draw(
    figure: Figure, comparison: Comparison, models: Distributions, title: str, theme: style.Theme, log_y: bool
) -> None:
    bottom, beyond = lowest(models, log_y)
    texts = Texts(title, subtitle(comparison), _caption(comparison, models, bool(beyond)))
    layout = draw_texts(figure, texts, [models.drawing], theme)
    ax: Any = figure.add_axes(layout.axes_box)
    frame(ax, comparison.axis.name, f"{_NAME} (nats; lower is better)")
    fit_x(ax, [point.x for point in models.points if point.x is not None])
    tops = [max(quantile(p, 95.0) or 0.0, quantile(p, FAR) or 0.0) for p in models.points]
    if log_y:
        ax.set_yscale("log")
    top = max(*tops, bottom * 10 if log_y else bottom + max(abs(bottom), 1e-9))
    ax.set_ylim(bottom, top * 1.1)
    if log_y:
        log_ticks(ax, top / bottom)
    make_room_for_ticks(figure, ax, layout.axes_box)
    labels = _labels(ax, models, layout.legend_shown, theme)
    _make_room(ax, labels, tops, bottom, log_y)
    if log_y:
        log_ticks(ax, ax.get_ylim()[1] / bottom)
    ax.yaxis.set_major_locator(FixedLocator([t for t in ax.get_yticks() if bottom * 0.99 <= t <= 1.02 * top]))
    make_room_for_ticks(figure, ax, layout.axes_box)
    _boxes(ax, models, theme, labels, tops, bottom)
    _floor(ax, comparison, models, theme)


def _scale(ax: Any) -> float:
    return float(ax.figure.dpi) / 72


def _labels(ax: Any, models: Distributions, legend_shown: bool, theme: style.Theme) -> list[Any]:
    """One upright label per model, not yet placed."""
    return [
        ax.text(
            0, 0, shorten(point_label(point, legend_shown), _LABEL_LENGTH), rotation=90, fontsize=style.LABEL,
            color=readable(models.drawing.colour(point, series, theme.dark), theme), ha="center", va="bottom", zorder=6,
            path_effects=[withStroke(linewidth=2.6, foreground=theme.ground)], transform=None,
        )
        for point, series in models.pairs
    ]  # fmt: skip


def _make_room(ax: Any, labels: list[Any], tops: list[float], bottom: float, log_y: bool) -> None:
    """Raises the upper limit until each label fits above its box, and leaves room for the feet of the boxes."""
    height, pad = ax.get_window_extent().height, 12 * _scale(ax)
    to, back = (log, exp) if log_y else (float, float)
    start, end = to(bottom), to(ax.get_ylim()[1])
    for label, value in zip(labels, tops, strict=True):
        taken = min((label.get_window_extent().height + pad) * (1 + _FEET), 0.6 * height)
        end = max(end, start + (to(max(value, bottom)) - start) * height / (height - taken))
    ax.set_ylim(back(start - (end - start) * _FEET), back(end))


def _boxes(
    ax: Any, models: Distributions, theme: style.Theme, labels: list[Any], tops: list[float], bottom: float
) -> None:
    """Quartile box, median, whiskers from 5 to 95 %, a stroke at 99 %; boxes that would meet are drawn side by side."""
    scale, extent = _scale(ax), ax.get_window_extent()
    true = [float(ax.transData.transform((point.x, 1))[0]) for point in models.points]
    gap = 1.25 * style.LABEL * scale
    shown = spread_apart(true, gap, extent.x0 + gap, extent.x1 - gap)
    spacing = min((b - a for a, b in pairwise(sorted(shown))), default=gap)
    half = min(_BOX * scale, 0.86 * spacing) / 2
    to_x = ax.transData.inverted()

    def x(pixel: float) -> float:
        return float(to_x.transform((pixel, extent.y0))[0])

    for (point, series), place, own, label, top in zip(models.pairs, shown, true, labels, tops, strict=True):
        colour = models.drawing.colour(point, series, theme.dark)
        low, q1, median, q3, high = (max(quantile(point, q) or 0.0, bottom) for q in (5.0, 25.0, 50.0, 75.0, 95.0))
        left, right, middle = x(place - half), x(place + half), x(place)
        ax.plot([x(own), middle], [0, _FOOT], transform=ax.get_xaxis_transform(), color=colour, linewidth=1.0, zorder=2)
        foot = ax.transData.inverted().transform((place, extent.y0 + _FOOT * extent.height))[1]
        if low > foot:
            ax.plot([middle, middle], [foot, low], color=colour, linewidth=0.8, alpha=0.35, zorder=2)
        ax.plot([middle, middle], [low, q1], color=colour, linewidth=1.5, zorder=3)
        ax.plot([middle, middle], [q3, high], color=colour, linewidth=1.5, zorder=3)
        for end, share in ((low, 0.5), (high, 0.5)):
            ax.plot(
                [x(place - half * share), x(place + half * share)], [end, end], color=colour, linewidth=1.5, zorder=3
            )
        ax.fill_between([left, right], q1, q3, facecolor=colour, alpha=0.34, linewidth=0, zorder=3)
        ax.plot([left, right, right, left, left], [q1, q1, q3, q3, q1], color=colour, linewidth=1.2, zorder=3.5)
        ax.plot([left, right], [median, median], color=colour, linewidth=2.4, zorder=4, solid_capstyle="butt")
        size = min(marker_size(series.style.marker) * 0.8, 2 * half / scale)
        ax.plot([middle], [median], marker=series.style.marker, markersize=size, color=colour,
                markeredgecolor=theme.ground, markeredgewidth=0.8, zorder=4.5)  # fmt: skip
        far = quantile(point, FAR)
        if far is not None and far > bottom:
            ax.plot([left, right], [far, far], color=colour, linewidth=1.8, zorder=4)
        if (quantile(point, 5.0) or 0.0) < bottom:
            ax.plot(
                [middle], [_FOOT], transform=ax.get_xaxis_transform(), marker="v", markersize=6, color=colour, zorder=5
            )
        y = ax.transData.transform((middle, max(top, bottom)))[1]
        label.set_position((place, min(y + 7 * scale, extent.y1 - label.get_window_extent().height)))
        label.set_transform(_pixels(ax))


def _pixels(ax: Any) -> Any:
    """A transform from pixels of this figure that holds when it is saved at another resolution."""
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(1 / ax.figure.bbox.width, 1 / ax.figure.bbox.height) + ax.figure.transFigure


def _floor(ax: Any, comparison: Comparison, models: Distributions, theme: style.Theme) -> None:
    """Shades up to where three quarters of the tokens of full precision lie."""
    highs = [quantile(point, 75.0) or 0.0 for point in models.noise_floor]
    low, high = ax.get_ylim()
    if not highs or max(highs) <= low:
        return
    start = low if ax.get_yscale() == "log" else 0.0
    ax.axhspan(start, min(max(highs), high), color=theme.soft, alpha=0.16, linewidth=0, zorder=0.6)
    ax.axhline(max(highs), color=theme.soft, linewidth=0.9, zorder=1)


def _caption(comparison: Comparison, models: Distributions, beyond: bool) -> list[str]:
    lines = ["Boxes: quartiles and median of all tokens; whiskers: 5 % and 95 %; stroke above: 99 %."]
    lines[0] += " Boxes that would meet stand side by side, a stroke at their foot leads to the true place."
    if beyond:
        lines.append(f"▼: goes on below the axis: zero, negative by rounding, or under {LOWEST:g}.")
    if models.noise_floor:
        highs = max(quantile(point, 75.0) or 0.0 for point in models.noise_floor)
        lines.append(
            f"Shaded: the noise floor, below {highs:.2g}: three quarters or more of the tokens of "
            f"{sources(models.noise_floor)}."
        )
    return lines + mixed(comparison)
