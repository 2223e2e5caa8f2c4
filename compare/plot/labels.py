"""Labels of points and reference lines, with leaders where a label had to move away."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke

from compare.comparison.best import frontier
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.plot import style
from compare.plot.captions import WEIGHT_ONLY_MARK, point_label
from compare.plot.header import marker_size
from compare.plot.kind import Say
from compare.plot.label_places import Box, Obstacles, Segment, covered, place
from compare.plot.series import Drawing
from compare.text import shorten

MAX_LABELS, IN_A_CROWD = 60, 24
_MAX_LENGTH, _MAX_FLOOR = 34, 90


def draw_labels(
    ax: Any, comparison: Comparison, drawing: Drawing, theme: style.Theme, legend_shown: bool, most: int = MAX_LABELS
) -> int:
    """Draws the labels; returns how many points have none. Of more than `most` points, only the best are labelled."""
    scale = ax.figure.dpi / 72
    obstacles = _obstacles(ax, drawing, 6.5 * scale)
    _limit_label(ax, drawing, theme, obstacles)
    _reference_labels(ax, drawing, theme, obstacles)
    _floor_label(ax, drawing, theme, obstacles)
    chosen = {id(point) for point in _labelled(comparison, drawing, most)}
    texts, anchors, colours = [], [], []
    for series in drawing.series:
        for point in series.points:
            if id(point) in chosen:
                colour = readable(drawing.colour(point, series, theme.dark), theme)
                texts.append(_text(ax, point, colour, theme, legend_shown))
                texts[-1].set_fontweight("bold" if point is drawing.best else "normal")
                anchors.append(tuple(ax.transData.transform((point.x, point.y))))
                colours.append(colour)
    placed = place(ax, texts, np.array(anchors), obstacles, pad=1.2 * scale)
    for box, anchor, colour in zip(placed, anchors, colours, strict=True):
        _leader(ax, box, anchor, colour, scale)
    return len(drawing.points) - len(texts)


def _obstacles(ax: Any, drawing: Drawing, radius: float) -> Obstacles:
    """The points, and the lines, error bars and reference lines as segments, in pixels."""
    points: list[tuple[float, float]] = []
    segments: list[Segment] = []
    for series in drawing.series:
        pixels = ax.transData.transform([(point.x, point.y) for point in series.points])
        points += [tuple(pixel) for pixel in pixels]
        if series.joined:
            segments += [(*a, *b) for a, b in pairwise(pixels)]
        for point in series.points:
            segments += _error_bar(ax, point)
    extent = ax.get_window_extent()
    for point in drawing.references:
        y = ax.transData.transform((0, point.y))[1]
        segments.append((extent.x0, y, extent.x1, y))
    if drawing.noise_floor is not None:
        for edge in {drawing.noise_floor.low, drawing.noise_floor.high}:
            y = ax.transData.transform((0, edge if edge > 0 or not drawing.log_y else ax.get_ylim()[0]))[1]
            segments.append((extent.x0, y, extent.x1, y))
    if drawing.limit is not None:
        x = ax.transData.transform((drawing.limit, 0))[0]
        segments.append((x, extent.y0, x, extent.y1))
    return Obstacles(np.array(points).reshape(-1, 2), radius, segments)


def _labelled(comparison: Comparison, drawing: Drawing, most: int) -> list[Point]:
    """Every point; of too many, those that no other beats in both size and metric."""
    points = drawing.points
    if len(points) <= most:
        return points
    best = frontier(points, bool(comparison.metric.higher_is_better))
    step = max(1, math.ceil(len(best) / IN_A_CROWD))
    return best[::step]


def _text(ax: Any, point: Point, colour: str, theme: style.Theme, legend_shown: bool) -> Any:
    label = shorten(point_label(point, legend_shown), _MAX_LENGTH)
    if point.record.quantization.runs_other_than_named:
        label += WEIGHT_ONLY_MARK
    return ax.text(
        point.x,
        point.y,
        label,
        fontsize=style.LABEL,
        color=colour,
        ha="center",
        va="center",
        zorder=6,
        path_effects=[withStroke(linewidth=2.6, foreground=theme.ground)],
    )


def _error_bar(ax: Any, point: Point) -> list[Segment]:
    if not point.stderr or point.y is None:
        return []
    low = max(point.y - point.stderr, ax.get_ylim()[0])
    (x0, y0), (x1, y1) = ax.transData.transform([(point.x, low), (point.x, point.y + point.stderr)])
    return [(x0, y0, x1, y1)]


def readable(colour: str, theme: style.Theme) -> str:
    """The colour, moved towards the ink, for text and thin lines."""
    mixed = [0.72 * c + 0.28 * ink for c, ink in zip(to_rgb(colour), to_rgb(theme.ink), strict=True)]
    return str(to_hex(mixed))


def _leader(ax: Any, box: Box, anchor: tuple[float, float], colour: str, scale: float) -> None:
    """A thin line from the marker's edge to the nearest point of the label, if they are apart."""
    start = np.array(anchor)
    end = np.clip(start, box[:2], box[2:])
    length = float(np.linalg.norm(end - start))
    gap = marker_size("o") / 2 * scale
    if length < gap + 8 * scale:
        return
    start = start + (end - start) * (gap / length)
    (x0, y0), (x1, y1) = ax.transData.inverted().transform([start, end])
    ax.plot([x0, x1], [y0, y1], color=colour, linewidth=0.8, alpha=0.55, zorder=2.5, scalex=False, scaley=False)


def _limit_label(ax: Any, drawing: Drawing, theme: style.Theme, obstacles: Obstacles) -> None:
    """``limit 8 GB`` at the top or the bottom of its line, on the side where it covers less."""
    if drawing.limit is None or drawing.limit >= ax.get_xlim()[1]:
        return
    tried = [
        ax.annotate(
            f"limit {drawing.limit:g} GB",
            (drawing.limit, end),
            xycoords=ax.get_xaxis_transform(),  # x in data, y from 0 to 1: right at any resolution
            xytext=(-5 if align == "right" else 5, -3 if end else 4),
            textcoords="offset points",
            fontsize=style.LABEL,
            color=theme.ink,
            ha=align,
            va="top" if end else "bottom",
            zorder=6,
        )
        for end in (1, 0)
        for align in ("right", "left")
    ]
    _keep_cheapest(ax, tried, obstacles)


def _floor_label(ax: Any, drawing: Drawing, theme: style.Theme, obstacles: Obstacles) -> None:
    """``noise floor: BF16 in vllm, rounding`` along the band's edge, inside or outside, where it covers less."""
    if drawing.noise_floor is None or not ax.get_ylim()[0] < drawing.noise_floor.high:
        return
    tried = [
        ax.annotate(
            shorten(f"noise floor: {drawing.noise_floor.source_names}", _MAX_FLOOR),
            (end, drawing.noise_floor.high),
            xycoords=ax.get_yaxis_transform(),
            xytext=(-6 if end else 6, 4 if side == "bottom" else -4),
            textcoords="offset points",
            fontsize=style.LABEL,
            color=theme.soft,
            ha="right" if end else "left",
            va=side,
            zorder=6,
            path_effects=[withStroke(linewidth=2.6, foreground=theme.ground)] if side == "bottom" else [],
        )
        for side in ("top", "bottom")
        for end in (0, 1)
    ]
    _keep_cheapest(ax, tried, obstacles)


def _keep_cheapest(ax: Any, tried: list[Any], obstacles: Obstacles) -> None:
    """Keeps, of equal texts, the one that covers least and stays in the axes; it becomes an obstacle."""
    extent = ax.get_window_extent()

    def cost(text: Any) -> int:
        box = text.get_window_extent()
        outside = box.x0 < extent.x0 or box.x1 > extent.x1 or box.y0 < extent.y0 or box.y1 > extent.y1
        return covered((box.x0, box.y0, box.x1, box.y1), obstacles) + 9 * outside

    kept = min(tried, key=cost)  # the first of equals
    for text in tried:
        if text is not kept:
            text.remove()
    box = kept.get_window_extent()
    obstacles.boxes.append((box.x0, box.y0, box.x1, box.y1))


def _reference_labels(ax: Any, drawing: Drawing, theme: style.Theme, obstacles: Obstacles) -> None:
    """On each dashed line, at the end and side where it covers least; lines close together share one label.

    Their boxes are added to `obstacles`.
    """
    height = style.LABEL * 1.5 * ax.figure.dpi / 72
    groups: list[list[tuple[float, Point]]] = []
    for y, point in sorted(
        ((float(ax.transData.transform((0, p.y))[1]), p) for p in drawing.references), key=lambda pair: pair[0]
    ):
        if groups and y - groups[-1][-1][0] < height:
            groups[-1].append((y, point))
        else:
            groups.append([(y, point)])
    for group in groups:
        words = [f"{shorten(p.record.label, _MAX_LENGTH)}  {p.y:.5g}" for _, p in group[:3]]
        if len(group) > 3:
            words.append(f"and {len(group) - 3} more")
        tried = [
            ax.annotate(
                "   ".join(words),
                (end, point.y),
                xycoords=ax.get_yaxis_transform(),  # x from 0 to 1, y in data: right at any resolution
                xytext=(-6 if end else 6, 4 if side == "bottom" else -5),
                textcoords="offset points",
                fontsize=style.LABEL,
                fontweight="bold",
                color=theme.ink,
                ha="right" if end else "left",
                va=side,
                zorder=6,
                path_effects=[withStroke(linewidth=2.6, foreground=theme.ground)],
            )
            for end in (0, 1)
            for point, side in ((group[-1][1], "bottom"), (group[0][1], "top"))
        ]
        _keep_cheapest(ax, tried, obstacles)


def say_unlabelled(unlabelled: int, say: Say) -> None:
    """Says how many points are drawn without a label, if any are."""
    if unlabelled:
        say(f"{unlabelled} points are drawn without a label, there is no room for more; --mask narrows the choice")
