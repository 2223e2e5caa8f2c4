"""What is drawn: lines of comparable points, single points, baseline lines, and messages on what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compare.comparison.axis import MEMORY
from compare.comparison.comparison import Comparison
from compare.comparison.memory import why_unknown
from compare.comparison.noise_floor import NoiseFloor
from compare.comparison.point import Point
from compare.families import DOMINATED, Family, family_style
from compare.text import is_colour


@dataclass
class Series:
    """Points of one join key, in order of x; drawn with a line if they are `joined`."""

    style: Family
    points: list[Point]
    joined: bool

    @property
    def name(self) -> str:
        return self.style.name


@dataclass
class Drawing:
    """What a scatter plot shows. `references` are horizontal lines; `left_out` are messages for the user.

    `dominated` points are grey, `frontiers` the others in order of x; `best` is the choice within the budget.
    """

    series: list[Series] = field(default_factory=list)
    references: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    colours: dict[int, str] = field(default_factory=dict)
    dominated: frozenset[int] = frozenset()
    frontiers: list[list[Point]] = field(default_factory=list)
    best: Point | None = None
    limit: float | None = None  # the budget, where it is a place on x
    log_y: bool = False
    noise_floor: NoiseFloor | None = None  # a band, instead of the points that define it

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]

    def colour(self, point: Point, series: Series, dark: bool) -> str:
        """The label's own colour tag, or the family's colour; grey for a dominated point."""
        if id(point) in self.dominated:
            return DOMINATED.dark if dark else DOMINATED.light
        return self.colours.get(id(point)) or (series.style.dark if dark else series.style.light)


def arrange(comparison: Comparison, log_y: bool | None) -> Drawing:
    """Sort the points of a comparison into lines, references, noise floor and what has no place in a plot.

    log_y: None leaves it to the metric: divergences span decades.
    """
    drawing = Drawing(log_y=_logarithmic(comparison) if log_y is None else log_y, noise_floor=comparison.noise_floor)
    floor = {id(point) for point in drawing.noise_floor.points} if drawing.noise_floor is not None else set()
    if floor and all(id(point) in floor for point in comparison.points if point.comparable):
        floor, drawing.noise_floor = set(), None  # full precision only: they are what is compared
    placed: list[Point] = []
    for point in comparison.points:
        if id(point) in floor:
            continue
        reason = _unplottable(point, comparison, drawing.log_y)
        if reason:
            drawing.left_out.append(f"not drawn: {point.record.label}: {reason}")
        elif _is_line(point, comparison):
            drawing.references.append(point)
        else:
            placed.append(point)
    with_x = [point for point in drawing.references if point.x is not None]
    drawing.left_out += _suggest_log(drawing, placed, comparison, log_y)
    if not placed and with_x:  # full precision only: they are what is compared, not the baseline
        placed, drawing.references = with_x, [point for point in drawing.references if point.x is None]
    _colour(drawing, placed + drawing.references)
    drawing.series = _series(placed)
    shown = {id(point) for point in placed}
    drawing.frontiers = [kept for points in comparison.frontiers if (kept := [p for p in points if id(p) in shown])]
    if comparison.options.pareto:
        drawing.dominated = frozenset(id(p) for p in placed if p.comparable and id(p) not in comparison.on_frontier)
    if comparison.verdict is not None:
        drawing.best = comparison.verdict.best
        drawing.limit = comparison.verdict.budget.gib if comparison.axis.key == MEMORY else None
    return drawing


_DECADES = 100  # a factor beyond which most points of a linear axis lie on one line


def _suggest_log(drawing: Drawing, placed: list[Point], comparison: Comparison, log_y: bool | None) -> list[str]:
    """A line that offers --log-y where the figures span decades and the user did not choose the scale."""
    values = [point.y for point in [*placed, *drawing.references] if point.y is not None]
    if log_y is not None or drawing.log_y or not values or min(values) <= 0 or max(values) < _DECADES * min(values):
        return []
    return [
        f"note: {comparison.metric.name.lower()} from {min(values):.4g} to {max(values):.4g}: --log-y draws it on a "
        "logarithmic axis"
    ]


def drawing_of(points: list[Point]) -> Drawing:
    """`points` by family, in their colours, and nothing else."""
    drawing = Drawing(series=_series(points))
    _colour(drawing, points)
    return drawing


def _colour(drawing: Drawing, points: list[Point]) -> None:
    """Sets the colours that labels ask for; warns of those that do not exist."""
    for point in points:
        if point.record.colour is not None:
            if is_colour(point.record.colour):
                drawing.colours[id(point)] = point.record.colour
            else:
                drawing.left_out.append(
                    f"warning: {point.record.label}: unknown colour [{point.record.colour}], the family's is used"
                )


def _logarithmic(comparison: Comparison) -> bool:
    """Whether a logarithmic axis is the better one, and there is something to see on it."""
    return comparison.metric.row.log_axis and any((point.y or 0) > 0 for point in comparison.points)


def _is_line(point: Point, comparison: Comparison) -> bool:
    """Full precision is a horizontal line; not where it is itself compared with a reference."""
    return point.record.is_baseline and point.comparable and not comparison.metric.row.needs_reference


def _unplottable(point: Point, comparison: Comparison, log_y: bool) -> str:
    if point.y is None:
        return f"{comparison.metric.name.lower()} is not a finite number in {point.record.file}"
    if log_y and point.y <= 0:
        return f"{point.y:g} has no place on a logarithmic axis; --no-log-y draws it"
    if point.x is not None or _is_line(point, comparison):
        return ""
    if comparison.axis.key == MEMORY:
        return why_unknown(point.record.quantization)
    if point.record.quantization.known:
        return f"its result file does not say {comparison.axis.short} ({comparison.axis.key})"
    return f"a stock model, {comparison.axis.short} unknown (the table lists it; --baseline draws a model as a line)"


def _series(points: list[Point]) -> list[Series]:
    by_key: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        by_key.setdefault(point.join_key, []).append(point)
    unknown = sorted({p.record.quantization.family for p in points})
    result = []
    for members in by_key.values():
        family = members[0].record.quantization.family
        members.sort(key=_by_x)
        apart = not members[0].comparable
        result.append(
            Series(
                style=family_style(family, unknown.index(family)),
                points=members,
                joined=len(members) > 1 and not apart,
            )
        )
    return result


_by_x: Callable[[Point], tuple[float, float, str]] = lambda p: (p.x or 0.0, p.y or 0.0, p.record.label)  # noqa: E731
