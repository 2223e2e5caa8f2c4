"""Inside the axes: reference lines with their bands, lines, error bars, markers, ticks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compare.comparison.comparison import Comparison
from compare.families import DOMINATED
from compare.plot import style
from compare.plot.captions import y_label
from compare.plot.header import marker_size
from compare.plot.series import Drawing, Series

_CROWD = 200  # points; beyond, lines and bars are thinner and paler so that the markers can be seen


def draw_data(ax: Any, comparison: Comparison, drawing: Drawing, theme: style.Theme) -> None:
    """Draws everything but the labels."""
    frame(ax, comparison.axis.name, y_label(comparison))
    _references(ax, drawing, theme)
    for series in drawing.series:
        _series(ax, drawing, series, theme)
    _limits(ax, drawing)
    _floor(ax, drawing, theme)
    _frontiers(ax, drawing, theme)
    _choice(ax, drawing, theme)
    if not drawing.points:
        ax.set_xticks([])
        ax.set_xlabel("no result with a place on this axis", fontsize=style.AXIS, color=theme.soft)


def frame(ax: Any, across: str, upwards: str) -> None:
    """Draws the grid, ticks without strokes, and the names of the axes."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(True, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelsize=style.TICK, pad=5)
    ax.set_xlabel(across, fontsize=style.AXIS, labelpad=8)
    ax.set_ylabel(upwards, fontsize=style.AXIS, labelpad=8)


def _references(ax: Any, drawing: Drawing, theme: style.Theme) -> None:
    for point in drawing.references:
        assert point.y is not None
        colour = drawing.colours.get(id(point), theme.ink)
        ax.axhline(point.y, color=colour, linewidth=1.4, linestyle=(0, (5, 3.5)), zorder=2)
    if drawing.references and drawing.references[0].stderr:
        first = drawing.references[0]
        assert first.y is not None
        assert first.stderr is not None
        ax.axhspan(first.y - first.stderr, first.y + first.stderr, color=theme.soft, alpha=0.13, linewidth=0, zorder=1)


def _series(ax: Any, drawing: Drawing, series: Series, theme: style.Theme) -> None:
    colours = [drawing.colour(point, series, theme.dark) for point in series.points]
    own = series.style.dark if theme.dark else series.style.light
    xs, ys = [point.x for point in series.points], [point.y for point in series.points]
    crowd = len(drawing.points) > _CROWD
    if series.joined:
        line = colours[0] if len(set(colours)) == 1 and not drawing.frontiers else own
        width, alpha = (1.2, 0.3) if drawing.frontiers else (2.2, 0.9)
        ax.plot(xs, ys, color=line, linewidth=min(width, 0.6 if crowd else width), alpha=alpha, zorder=3,
                solid_joinstyle="round")  # fmt: skip
    by_colour: dict[str, list[int]] = defaultdict(list)
    for index, colour in enumerate(colours):
        by_colour[colour].append(index)
    hollow = not series.points[0].comparable
    edge = 1.6 if hollow else 0.0 if crowd else 0.9
    for colour, chosen in by_colour.items():
        barred = [i for i in chosen if series.points[i].stderr]
        if barred:
            ax.errorbar(
                [xs[i] for i in barred],
                [ys[i] for i in barred],
                yerr=[series.points[i].stderr for i in barred],
                fmt="none",
                ecolor=colour,
                elinewidth=1.6,
                alpha=0.2 if crowd else 0.55,
                zorder=3.5,
            )
        ax.plot(
            [xs[i] for i in chosen],
            [ys[i] for i in chosen],
            linestyle="none",
            marker=series.style.marker,
            markersize=marker_size(series.style.marker, len(drawing.points)),
            markerfacecolor=theme.ground if hollow else colour,
            markeredgecolor=colour if hollow else theme.ground,
            markeredgewidth=edge,
            zorder=3.8 if colour in (DOMINATED.light, DOMINATED.dark) else 4,
        )


def _floor(ax: Any, drawing: Drawing, theme: style.Theme) -> None:
    """Shades the noise floor, to the edge of the axes where it begins at zero on a logarithmic axis."""
    if drawing.noise_floor is None:
        return
    low, high = drawing.noise_floor.low, drawing.noise_floor.high
    bottom = ax.get_ylim()[0]
    if drawing.log_y and high <= bottom:
        return
    ax.axhspan(bottom if drawing.log_y else low, high, color=theme.soft, alpha=0.16, linewidth=0, zorder=0.6)
    for edge in (low, high):
        if edge > bottom:
            ax.axhline(edge, color=theme.soft, linewidth=0.9, zorder=1)


def _frontiers(ax: Any, drawing: Drawing, theme: style.Theme) -> None:
    """Draws steps: the best metric at each size."""
    right = ax.get_xlim()[1]
    for points in drawing.frontiers:
        xs, ys = [p.x for p in points], [p.y for p in points]
        ax.step([*xs, right], [*ys, ys[-1]], where="post", color=theme.ink, linewidth=5.5, alpha=0.13, zorder=2.4,
                solid_capstyle="butt", scalex=False, scaley=False)  # fmt: skip


def _choice(ax: Any, drawing: Drawing, theme: style.Theme) -> None:
    """The memory limit, what lies beyond it shaded, and a ring about the best model within."""
    limit, right = drawing.limit, ax.get_xlim()[1]
    if limit is not None and limit < right:
        ax.axvspan(limit, right, color=theme.soft, alpha=0.10, linewidth=0, zorder=0.5)
        ax.axvline(limit, color=theme.ink, linewidth=1.3, zorder=2)
    best = drawing.best
    if best is not None and any(best is point for point in drawing.points):
        size = marker_size("o", len(drawing.points)) + 9
        ax.plot([best.x], [best.y], linestyle="none", marker="o", markersize=size, markerfacecolor="none",
                markeredgecolor=theme.ink, markeredgewidth=1.6, zorder=5)  # fmt: skip


def _limits(ax: Any, drawing: Drawing) -> None:
    """Leaves room around every point, bar and line; the range is never empty, even for a single point."""
    shown = drawing.points + drawing.references
    ys = [(point.y or 0.0, point.stderr or 0.0) for point in shown]
    if drawing.noise_floor is not None and drawing.log_y:  # its top only: zero has no place on a logarithmic axis
        ys += [(drawing.noise_floor.high, 0.0)] if drawing.noise_floor.high > 0 else []
    elif drawing.noise_floor is not None:
        ys += [(drawing.noise_floor.low, 0.0), (drawing.noise_floor.high, 0.0)]
    low, high = min(y - e for y, e in ys), max(y + e for y, e in ys)
    if drawing.log_y:
        low = max(low, min(y for y, _ in ys) / 2)
        ax.set_yscale("log")
        factor = (high / low) ** 0.09 if high > low else 1.2
        ax.set_ylim(low / factor, high * factor)
        log_ticks(ax, high / low)
    else:
        room = (high - low) * 0.09 or abs(high) * 0.05 or 1.0
        ax.set_ylim(low - room, high + room)
    xs = [point.x for point in drawing.points if point.x is not None] or [0.0]
    span = max(xs) - min(xs)
    if drawing.limit is not None and drawing.limit < max(xs) + 0.8 * span:
        xs.append(drawing.limit)
    fit_x(ax, xs)


def fit_x(ax: Any, xs: Sequence[float]) -> None:
    """Sets the horizontal limits so that there is room beside the outermost of `xs`, and ticks at round numbers."""
    room = (max(xs) - min(xs)) * 0.07 or abs(xs[0]) * 0.2 or 1.0
    ax.set_xlim(min(xs) - room, max(xs) + room)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10]))


def log_ticks(ax: Any, ratio: float) -> None:
    """Plain numbers on a logarithmic axis whose ends differ by `ratio`; only powers of ten over many decades."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    many = ratio < 5
    subs = (1.0, 2.0, 3.0, 5.0) if ratio < 3e3 else (1.0, 3.0) if ratio < 3e5 else (1.0,)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=8) if many else LogLocator(subs=subs, numticks=14))
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_locator(NullLocator())
