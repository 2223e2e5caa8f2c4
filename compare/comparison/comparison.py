"""`Comparison`: one metric, one axis, the points, and everything that is judged from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from compare.comparison.axis import Axis
from compare.comparison.best import BudgetVerdict, frontiers, judge
from compare.comparison.memory import Budget
from compare.comparison.metric_choice import MetricChoice
from compare.comparison.noise_floor import NoiseFloor, measure_noise_floor, within
from compare.comparison.pairs import Pairs
from compare.comparison.point import Point
from compare.metrics import from_reference
from compare.results.records import ProtocolRecord


@dataclass(frozen=True)
class Options:
    """What the user asked to see. `context` in tokens; `budget` in units of 1024³ bytes, with a context only.

    metrics: each is a comparison of its own, or, with `mean`, a part of one; none: the perplexity. `subtasks`: those of
    the groups named, instead of the groups.
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
    sort: str = "family"


@dataclass
class Comparison:
    """What is shown; `notices` says everything that was left out, replaced or kept apart."""

    metric: MetricChoice
    axis: Axis
    points: list[Point]
    notices: list[str] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    pairs: Pairs | None = None  # with --versus: each point against one of them

    @cached_property
    def references(self) -> dict[int | None, Point]:
        """The full-precision point of each model size, that the others of that size are measured against."""
        if from_reference(self.metric.metric):
            return {}  # every figure is one against the reference already
        candidates = [p for p in self.points if p.comparable and p.record.is_reference and p.y is not None]
        candidates.sort(key=lambda p: (not p.record.quantization.known, p.record.label))
        return {p.size: p for p in reversed(candidates)}

    @property
    def reference(self) -> Point | None:
        """The reference of the model size that most points have, if there is one."""
        return self.references.get(0)

    @cached_property
    def noise_floor(self) -> NoiseFloor | None:
        """The differences from the reference that are noise; None for figures that do not come from a reference."""
        return measure_noise_floor(self.points, self.metric)

    @property
    def in_noise(self) -> list[Point]:
        """The points whose difference from the reference is within the noise floor."""
        return within(self.points, self.noise_floor)

    @cached_property
    def frontiers(self) -> list[list[Point]]:
        """Pareto frontiers in order of x, if they were asked for."""
        return frontiers(self.points, self.metric, self.axis) if self.options.pareto else []

    @cached_property
    def on_frontier(self) -> frozenset[int]:
        """`id` of each point of the frontiers."""
        return frozenset(id(point) for points in self.frontiers for point in points)

    @cached_property
    def verdict(self) -> BudgetVerdict | None:
        """Which models fit the budget, if there is one."""
        if self.options.budget is None or self.options.context is None:
            return None
        return judge(self.points, self.metric, Budget(self.options.budget, self.options.context))

    @property
    def parts(self) -> list[MetricChoice]:
        """The tasks that stand beside a mean, those left out of it too; none otherwise."""
        return [part.choice for part in self.points[0].parts]

    @property
    def mixed_in(self) -> list[Point]:
        """With --allow-mixed: the points over other tokens, or from another reference, than the first one."""
        points = [p for p in self.points if p.comparable]
        over = [p.record.comparability(self.metric.metric) for p in points]
        return [p for p, own in zip(points, over, strict=True) if own != over[0]]

    @property
    def protocol(self) -> ProtocolRecord:
        """What the comparable points were scored on."""
        comparable = [p for p in self.points if p.comparable] or self.points
        return comparable[0].record.protocol
