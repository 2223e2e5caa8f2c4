"""Where labels go: each on its cheapest place near its point, given the places of the others.

All geometry is in pixels of the figure. A label may not cover another label, a point, or leave the axes; it should not
lie on a line, and its leader should cross nothing. Places are tried on rings around the point. That descent ends in a
local minimum, so it starts three times, and the cheapest layout is kept; everything is deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Segment = tuple[float, float, float, float]

_COVERS_LABEL, _COVERS_POINT, _CUTS_LABEL, _CROSSES_LEADER, _ON_LINE = 1000.0, 400.0, 120.0, 60.0, 45.0
_MAX_POINTS, _MAX_SEGMENTS = 200, 400
_TRIED_FIRST = 49  # of 361 places


@dataclass
class Obstacles:
    """What labels keep away from: points with their radius, line segments, boxes such as the legend."""

    points: np.ndarray  # [P, 2]
    radius: float
    segments: list[Segment] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)


def place(ax: Any, texts: list[Any], anchors: np.ndarray, obstacles: Obstacles, pad: float = 2.0) -> list[Box]:
    """Moves `texts` (matplotlib, centred on their anchors [N, 2] in pixels) and returns their boxes."""
    if not texts:
        return []
    obstacles = _bounded(obstacles, anchors)
    renderer = ax.figure.canvas.get_renderer()
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([(e.width + 6 * pad, e.height + 2 * pad) for e in extents])  # words need room sideways
    bounds = ax.get_window_extent(renderer)
    centres = _settled(sizes, anchors, obstacles, (bounds.x0, bounds.y0, bounds.x1, bounds.y1))
    inverse = ax.transData.inverted()
    boxes = []
    for text, centre, size in zip(texts, centres, sizes, strict=True):
        text.set_position(inverse.transform(centre))
        boxes.append(_box(centre, size - np.array([5 * pad, 2 * pad])))
    return boxes


def _bounded(obstacles: Obstacles, anchors: np.ndarray) -> Obstacles:
    """The same obstacles up to some hundred points; of more, one per patch of a marker's size, nearest to labels first.

    Keeps the cost of placing labels independent of how many points are drawn.
    """
    points, segments = obstacles.points, obstacles.segments
    if len(points) > _MAX_POINTS:
        patches = np.unique(np.round(points / obstacles.radius), axis=0) * obstacles.radius
        distance = np.full(len(patches), np.inf)
        for anchor in anchors:
            distance = np.minimum(distance, np.linalg.norm(patches - anchor, axis=1))
        points = np.vstack([anchors, patches[np.argsort(distance, kind="stable")[:_MAX_POINTS]]])
    if len(segments) > _MAX_SEGMENTS:  # lines everywhere: no label can keep off them
        segments = []
    return Obstacles(points, obstacles.radius, segments, obstacles.boxes)


def _box(centre: np.ndarray, size: np.ndarray) -> Box:
    return (centre[0] - size[0] / 2, centre[1] - size[1] / 2, centre[0] + size[0] / 2, centre[1] + size[1] / 2)


def _settled(sizes: np.ndarray, anchors: np.ndarray, obstacles: Obstacles, bounds: Box) -> np.ndarray:
    """The cheapest layout of three descents [N, 2]: from other first places, and with the labels in another order."""
    count = len(anchors)
    downwards = np.argsort(-anchors[:, 1], kind="stable").tolist()
    descents: list[tuple[np.ndarray, list[int]]] = [
        (anchors, list(range(count))),
        (_beside(anchors, sizes, obstacles.radius + 34, 1 / 8), list(range(count))[::-1]),
        (_beside(anchors, sizes, obstacles.radius + 16, 7 / 8), downwards),
    ]
    layouts = [_descend(_Layout(first.copy(), sizes, anchors, obstacles, bounds), order) for first, order in descents]
    return min(layouts, key=_Layout.rounded_total).centres  # the first of equals


def _beside(anchors: np.ndarray, sizes: np.ndarray, reach: float, turn: float) -> np.ndarray:
    """[N, 2] places where each box stands `reach` pixels from its point, in the direction `turn` × 360°."""
    angle = math.tau * turn
    return anchors + np.array([math.cos(angle), math.sin(angle)]) * (sizes / 2 + reach)


def _descend(layout: _Layout, order: list[int]) -> _Layout:
    """Up to four rounds over all labels, each taking its cheapest place given the others'."""
    for _ in range(4):
        moved = [layout.improve(i) for i in order]
        if not any(moved):
            break
    return layout


# Rings around a point, in pixels from its marker's edge, and the directions on each
_RINGS = np.array([1, 5, 10, 16, 24, 34, 50, 70, 95, 125, 160, 200, 250, 310, 380])
_DIRECTIONS = np.array([(math.cos(math.tau * step / 24), math.sin(math.tau * step / 24)) for step in range(24)])


class _Layout:
    def __init__(
        self, centres: np.ndarray, sizes: np.ndarray, anchors: np.ndarray, obstacles: Obstacles, bounds: Box
    ) -> None:
        self.centres, self.sizes, self.anchors, self.obstacles, self.bounds = centres, sizes, anchors, obstacles, bounds
        self.segments = np.array(obstacles.segments).reshape(-1, 4)
        self.fixed = np.array(obstacles.boxes).reshape(-1, 4)

    def improve(self, i: int) -> bool:
        """Puts label `i` on its cheapest place; returns whether it moved.

        What a place covers is counted only where the place is near enough to be the cheapest.
        """
        candidates = self._candidates(i)
        distance = self._distance_costs(i, candidates)
        tried = np.argsort(distance, kind="stable")[:_TRIED_FIRST]
        tried[-1] = 0  # the present place
        costs = np.full(len(candidates), np.inf)
        costs[tried] = distance[tried] + self._covering_costs(i, candidates[tried])
        rest = np.isinf(costs) & (distance <= costs.min())
        costs[rest] = distance[rest] + self._covering_costs(i, candidates[rest])
        best = int(np.argmin(costs))
        if costs[best] > costs[0] - 1e-6:
            best = 0
        self.centres[i] = candidates[best]  # even the present place may have been moved into the axes
        return best != 0

    def rounded_total(self) -> float:
        """The sum of all labels' costs; rounded, so that rounding errors do not choose between equal layouts."""
        return round(sum(self._cost(i) for i in range(len(self.centres))), 6)

    def _cost(self, i: int) -> float:
        """The cost of the present place of label `i`."""
        place = self.centres[i : i + 1]
        return float((self._distance_costs(i, place) + self._covering_costs(i, place))[0])

    def _candidates(self, i: int) -> np.ndarray:
        """The present place, then rings around its point: the box's edge, not its middle, keeps the ring's distance."""
        width, height = self.sizes[i]
        reach = self.obstacles.radius + _RINGS[:, None]
        rings = np.stack([_DIRECTIONS[:, 0] * (width / 2 + reach), _DIRECTIONS[:, 1] * (height / 2 + reach)], axis=2)
        centres = np.vstack([self.centres[i], self.anchors[i] + rings.reshape(-1, 2)])
        x0, y0, x1, y1 = self.bounds
        centres[:, 0] = np.clip(centres[:, 0], x0 + width / 2 + 2, max(x1 - width / 2 - 2, x0 + width / 2 + 2))
        centres[:, 1] = np.clip(centres[:, 1], y0 + height / 2 + 2, max(y1 - height / 2 - 2, y0 + height / 2 + 2))
        return centres

    def _nearest(self, i: int, places: np.ndarray) -> np.ndarray:
        """[C, 2] where the leader of label `i` would end: the point of each box that is nearest to the anchor."""
        half = self.sizes[i] / 2
        nearest: np.ndarray = np.clip(self.anchors[i], places - half, places + half)
        return nearest

    def _distance_costs(self, i: int, places: np.ndarray) -> np.ndarray:
        """[C] cost of each place if it covers and crosses nothing."""
        length = np.linalg.norm(self._nearest(i, places) - self.anchors[i], axis=1)
        # Above and to the right reads best when everything else is equal.
        side = 1.5 * (places[:, 1] < self.anchors[i][1]) + 0.5 * (places[:, 0] < self.anchors[i][0])
        cost: np.ndarray = length * 0.25 + length**2 * 0.002 + side
        return cost

    def _covering_costs(self, i: int, places: np.ndarray) -> np.ndarray:
        """[C] cost of what each place covers and its leader crosses, at least 0."""
        half = self.sizes[i] / 2
        boxes = np.hstack([places - half, places + half])
        others = np.arange(len(self.centres)) != i
        other_half = self.sizes[others] / 2
        labels = np.vstack(
            [np.hstack([self.centres[others] - other_half, self.centres[others] + other_half]), self.fixed]
        )
        nearest = self._nearest(i, places)
        leader = np.hstack([np.broadcast_to(self.anchors[i], nearest.shape), nearest])
        points = self.obstacles.points
        inside = _distance_to_boxes(points, boxes) < self.obstacles.radius
        cost: np.ndarray = _COVERS_LABEL * _overlaps(boxes, labels).sum(axis=1)
        cost += _COVERS_POINT * inside.sum(axis=1)
        cost += _ON_LINE * _segments_hit_boxes(self.segments, boxes).sum(axis=0)
        own = np.linalg.norm(points - self.anchors[i], axis=1) < 1e-6
        near = _distance_to_segments(points[~own], leader) < self.obstacles.radius * 0.8
        cost += _COVERS_POINT * near.sum(axis=1)
        cost += _CUTS_LABEL * _segments_hit_boxes(leader, labels).sum(axis=1)
        if others.any():
            theirs = np.hstack([self.anchors[others], self.centres[others]])
            cost += _CROSSES_LEADER * _cross(leader, theirs).sum(axis=1)
        return cost


def covered(box: Box, obstacles: Obstacles) -> int:
    """How many points, lines and boxes a text in `box` would lie on; a point counts as much as three lines."""
    boxes = np.array([box])
    points = (_distance_to_boxes(obstacles.points, boxes) < obstacles.radius).sum()
    lines = _segments_hit_boxes(np.array(obstacles.segments).reshape(-1, 4), boxes).sum()
    labels = _overlaps(boxes, np.array(obstacles.boxes).reshape(-1, 4)).sum()
    return int(3 * points + lines + 3 * labels)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] whether boxes overlap."""
    return (
        (a[:, None, 0] < b[None, :, 2])
        & (a[:, None, 2] > b[None, :, 0])
        & (a[:, None, 1] < b[None, :, 3])
        & (a[:, None, 3] > b[None, :, 1])
    )


def _distance_to_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[B, P] distance of each point to each box, 0 inside."""
    x, y = points.T
    dx = np.clip(x, boxes[:, 0, None], boxes[:, 2, None]) - x
    dy = np.clip(y, boxes[:, 1, None], boxes[:, 3, None]) - y
    return np.sqrt(dx * dx + dy * dy)


def _distance_to_segments(points: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[S, P] distance of each point to each segment."""
    (x, y), (x0, y0, x1, y1) = points.T, segments.T[:, :, None]
    dx, dy = x1 - x0, y1 - y0
    squared = np.maximum(dx**2 + dy**2, 1e-12)
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / squared, 0, 1)
    left, up = x0 + t * dx - x, y0 + t * dy - y
    return np.sqrt(left * left + up * up)


def _segments_hit_boxes(segments: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[S, B] whether a segment passes through a box (Liang-Barsky clipping)."""
    enter, leave = _crossing(segments[:, 0], segments[:, 2], boxes[:, 0], boxes[:, 2])
    enter_y, leave_y = _crossing(segments[:, 1], segments[:, 3], boxes[:, 1], boxes[:, 3])
    enter, leave = np.maximum(enter, enter_y), np.minimum(leave, leave_y)
    return np.maximum(enter, 0) < np.minimum(leave, 1)


def _crossing(start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, B] the parts of each segment, 0 to 1, at which it enters and leaves each interval of one coordinate."""
    direction = end - start
    safe = np.where(np.abs(direction) < 1e-9, 1e-9, direction)[:, None]
    first, second = (low - start[:, None]) / safe, (high - start[:, None]) / safe
    return np.minimum(first, second), np.maximum(first, second)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] whether segments cross."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    a0, a1, b0, b1 = a[:, None, :2], a[:, None, 2:], b[None, :, :2], b[None, :, 2:]
    return (side(a0, a1, b0) * side(a0, a1, b1) < 0) & (side(b0, b1, a0) * side(b0, b1, a1) < 0)
