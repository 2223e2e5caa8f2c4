"""How many tokens diverge by how much: a step line per model, on a logarithmic axis across."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compare.comparison.comparison import Comparison
from compare.comparison.noise_floor import source
from compare.comparison.point import Point
from compare.plot import style
from compare.plot.axes import frame, log_ticks
from compare.plot.captions import Texts, mixed, subtitle
from compare.plot.distributions import Distributions, histogram, histograms
from compare.plot.header import draw_texts, make_room_for_ticks
from compare.plot.kind import DistributionKind, PlotSettings, Say
from compare.plot.lines import beside_legend, draw_legend, name_room, strokes
from compare.text import shorten

_TITLE = "How far tokens diverge"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class TokenHistogram(DistributionKind):
    """A step line per model; it needs no size."""

    excluded_flags = (*DistributionKind.excluded_flags, "--x")

    @staticmethod
    def select(comparison: Comparison) -> Distributions:
        return histograms(comparison)

    def default_title(self) -> str:
        return _TITLE

    def describe(self) -> str:
        return f"{self.title}: histograms of {', '.join(point.record.label for point in self.shown.points)}."

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        _draw(figure, self.comparison, self.shown, self.title, settings.theme, bool(settings.log_y))


KIND = TokenHistogram


def power(exponent: float) -> str:
    """``10⁻⁴``; ``10^-2.5`` where the exponent is not a whole number."""
    return "10" + str(int(exponent)).translate(_SUPERSCRIPT) if exponent == int(exponent) else f"10^{exponent:g}"


def outside(point: Point) -> str:
    """``0.31 % below 10⁻¹⁰``: the tokens of a model outside the axis; empty where there are none."""
    counts = histogram(point)
    parts = [(counts.below, f"below {power(counts.edges[0])}"), (counts.above, f"above {power(counts.edges[-1])}")]
    return ", ".join(f"{_share(count, counts.total)} {where}" for count, where in parts if count)


def _share(count: int, total: int) -> str:
    share = count / total
    return "< 0.01 %" if share < 1e-4 else f"{100 * share:.2g} %"


def _draw(
    figure: Figure, comparison: Comparison, models: Distributions, title: str, theme: style.Theme, log_y: bool
) -> None:
    caption = ["Tokens by the divergence of their next-token distribution from the reference's, as a share of all "
               "tokens per factor of ten."]  # fmt: skip
    if models.noise_floor:
        caption.append("Shaded: full precision, whose divergence is noise.")
    caption += mixed(comparison)
    layout = draw_texts(figure, Texts(title, subtitle(comparison), caption), [], theme)
    box = beside_legend(layout.axes_box)
    ax: Any = figure.add_axes(box)
    frame(ax, "KL divergence of a token (nats)", "Share of tokens per factor of ten")
    handles: list[Any] = []
    names: list[str] = []
    room = name_room(models)
    for point, stroke in zip(models.points, strokes(models, theme), strict=True):
        steps, heights = _steps(point)
        ax.plot(steps, heights, **stroke, linewidth=1.7, zorder=3, solid_joinstyle="miter")
        handles.append(Line2D([], [], **stroke, linewidth=1.9))
        names.append(_name(point, shorten(point.record.label, room)))
    for number, point in enumerate(models.noise_floor):
        steps, heights = _steps(point)
        alpha = 0.13 + 0.12 * (number % 3)
        ax.fill_between(steps, 0 if not log_y else 1e-12, heights, color=theme.soft, alpha=alpha, linewidth=0, zorder=1)
        ax.plot(steps, heights, color=theme.soft, linewidth=0.8, zorder=1.5)
        handles.append(Patch(facecolor=theme.soft, alpha=alpha + 0.06))
        names.append(_name(point, shorten(source(point), room)))
    _limits(ax, models, log_y)
    make_room_for_ticks(figure, ax, box)
    draw_legend(figure, layout.axes_box, handles, names)


def _name(point: Point, label: str) -> str:
    more = outside(point)
    return f"{label}\n{more}" if more else label


def _steps(point: Point) -> tuple[list[float], list[float]]:
    """The outline of a histogram, from zero to zero."""
    counts = histogram(point)
    steps, heights = [counts.edges[0]], [0.0]
    for (a, b), density in zip(pairwise(counts.edges), counts.densities(), strict=True):
        steps += [a, b]
        heights += [density, density]
    return [*steps, counts.edges[-1]], [*heights, 0.0]


def _limits(ax: Any, models: Distributions, log_y: bool) -> None:
    """Sets x from the first to the last bin that holds a token, and y so that every share fits."""
    ends: list[float] = []
    peaks: list[float] = []
    for point in models.points + models.noise_floor:
        shown = histogram(point)
        ends += [e for (a, b), n in zip(pairwise(shown.edges), shown.counts, strict=True) if n for e in (a, b)]
        peaks += [density for density in shown.densities() if density]
    low, high = (min(ends), max(ends)) if ends else (-10.0, 2.0)
    ax.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    top = max(peaks, default=1.0)
    if log_y:
        bottom = min(peaks, default=1e-4) / 1.5
        ax.set_yscale("log")
        ax.set_ylim(bottom, top * 1.5)
        log_ticks(ax, top / bottom)
    else:
        ax.set_ylim(0, top * 1.07)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
