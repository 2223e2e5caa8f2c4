"""`Comparison`: one metric, one axis, the points, and the judgements that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from compare.comparison.axis import Axis
from compare.comparison.best import BudgetVerdict, frontiers, judge
from compare.comparison.by_position import PositionPairs
from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.memory import Budget
from compare.comparison.noise_floor import NoiseFloor, measure_noise_floor, within
from compare.comparison.pairs import Pairs
from compare.comparison.point import Point
from compare.results.records import ProtocolRecord


@dataclass(frozen=True)
class Options:
    """What the user asked to see. `context` is in tokens; `budget` in units of 1024³ bytes, only with a context.

    metrics: each gives a comparison of its own or, with `mean`, a part of one; none: the perplexity. subtasks: compare
    the subtasks of the groups named instead of the groups. baseline: label of the model that others are compared with.
    by_position: show how the metric depends on the position.
    """

    metrics: tuple[str, ...] = ()
    subtasks: bool = False
    mean: bool = False
    axis: str = "bpw"
    pareto: bool = False
    budget: float | None = None
    context: int | None = None
    mask: str | None = None
    max_x: float | None = None
    max_y: float | None = None
    allow_mixed: bool = False
    baseline: str | None = None
    sort: str = "family"
    by_position: bool = False


@dataclass
class Comparison:
    """The points to show; `notices` names everything that was left out, replaced or kept apart."""

    metric: ChosenMetric
    axis: Axis
    points: list[Point]
    notices: list[str] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    pairs: Pairs | None = None  # with --versus: each point against a baseline
    position_pairs: PositionPairs | None = None  # with --versus and --by-position

    @cached_property
    def baselines(self) -> dict[int | None, Point]:
        """The full-precision point of each model size, with which the others of that size are compared."""
        if self.metric.row.needs_reference:
            return {}  # every figure already compares with the reference
        candidates = [p for p in self.points if p.comparable and p.record.is_baseline and p.y is not None]
        candidates.sort(key=_baseline_order)
        return {p.size: p for p in reversed(candidates)}

    @property
    def baseline(self) -> Point | None:
        """The baseline of the model size that most points have, if there is one."""
        return self.baselines.get(0)

    @cached_property
    def noise_floor(self) -> NoiseFloor | None:
        """The differences from the reference that are noise; None for metrics that need no reference."""
        return measure_noise_floor(self.points, self.metric)

    @property
    def in_noise(self) -> list[Point]:
        """The points whose difference from the reference is within the noise floor."""
        return within(self.points, self.noise_floor)

    @cached_property
    def frontiers(self) -> list[list[Point]]:
        """Pareto frontiers in order of x; empty without --pareto."""
        return frontiers(self.points, self.metric, self.axis) if self.options.pareto else []

    @cached_property
    def on_frontier(self) -> frozenset[int]:
        """`id` of each point of the frontiers."""
        return frozenset(id(point) for points in self.frontiers for point in points)

    @cached_property
    def verdict(self) -> BudgetVerdict | None:
        """Which models fit the budget; None without one."""
        if self.options.budget is None or self.options.context is None:
            return None
        return judge(self.points, self.metric, Budget(self.options.budget, self.options.context))

    @property
    def parts(self) -> list[ChosenMetric]:
        """The metrics shown beside a mean, including those left out of it; none otherwise."""
        return [part.metric for part in self.points[0].parts]

    @property
    def mixed_in(self) -> list[Point]:
        """With --allow-mixed: the points over other tokens, or from another reference, than the first one."""
        points = [p for p in self.points if p.comparable]
        keys = [p.record.comparability(self.metric.metric) for p in points]
        return [p for p, key in zip(points, keys, strict=True) if key != keys[0]]

    @property
    def protocol(self) -> ProtocolRecord:
        """The protocol of the comparable points."""
        comparable = [p for p in self.points if p.comparable] or self.points
        return comparable[0].record.protocol


def _baseline_order(point: Point) -> tuple[bool, bool, bool, str]:
    """Sort key: sound figures first, then what the user named, then results with a quantization block."""
    record = point.record
    return (bool(record.not_numbers), not record.baseline_by, not record.quantization.known, record.label)
