"""Labels of points and reference lines, with leaders where a label had to move away."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patheffects import withStroke

from compare.comparison import Comparison, Point
from compare.plot import style
from compare.plot.header import marker_size
from compare.plot.labels import Box, Obstacles, Segment, covered, place
from compare.plot.series import Drawing
from compare.plot.words import WEIGHT_ONLY_MARK, point_label
from compare.text import shorten

MAX_LABELS, IN_A_CROWD = 60, 24
_MAX_LENGTH = 34


def draw_labels(ax: Any, comparison: Comparison, drawing: Drawing, theme: style.Theme, legend_shown: bool) -> int:
    """Draw them; returns how many points stay without a label."""
    scale = ax.figure.dpi / 72
    obstacles = _obstacles(ax, drawing, 6.5 * scale)
    _reference_labels(ax, drawing, theme, obstacles)
    chosen = {id(point) for point in _labelled(comparison, drawing)}
    texts, anchors, colours = [], [], []
    for series in drawing.series:
        for point in series.points:
            if id(point) in chosen:
                colour = _readable(drawing.colour(point, series, theme.dark), theme)
                texts.append(_text(ax, point, colour, theme, legend_shown))
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
    return Obstacles(np.array(points).reshape(-1, 2), radius, segments)


def _labelled(comparison: Comparison, drawing: Drawing) -> list[Point]:
    """Every point, or, where they are too many, those no other beats in both size and metric."""
    points = drawing.points
    if len(points) <= MAX_LABELS:
        return points
    sign = -1.0 if comparison.metric.higher_is_better else 1.0
    frontier: list[Point] = []
    for point in sorted((p for p in points if p.comparable), key=lambda p: (p.x or 0.0, sign * (p.y or 0.0))):
        if not frontier or sign * (point.y or 0.0) < sign * (frontier[-1].y or 0.0):
            frontier.append(point)
    step = max(1, -(-len(frontier) // IN_A_CROWD))
    return frontier[::step]


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


def _readable(colour: str, theme: style.Theme) -> str:
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


def _reference_labels(ax: Any, drawing: Drawing, theme: style.Theme, obstacles: Obstacles) -> None:
    """On each dashed line, at the end and side where least is in the way; lines close together share one label.

    Their boxes are added to `obstacles`.
    """
    extent = ax.get_window_extent()
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
        best = None
        for x, align in ((extent.x0, "left"), (extent.x1, "right")):
            for y, side in ((group[-1][0], "bottom"), (group[0][0], "top")):
                text = ax.annotate(
                    "   ".join(words),
                    (x, y),
                    xycoords="figure pixels",
                    xytext=(6 if align == "left" else -6, 4 if side == "bottom" else -5),
                    textcoords="offset points",
                    fontsize=style.LABEL,
                    fontweight="bold",
                    color=theme.ink,
                    ha=align,
                    va=side,
                    zorder=6,
                    path_effects=[withStroke(linewidth=2.6, foreground=theme.ground)],
                )
                box = text.get_window_extent()
                cost = covered((box.x0, box.y0, box.x1, box.y1), obstacles) + 9 * (box.y0 < extent.y0)
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, text)
                else:
                    text.remove()
        assert best is not None
        box = best[1].get_window_extent()
        obstacles.boxes.append((box.x0, box.y0, box.x1, box.y1))
