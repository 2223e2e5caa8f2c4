"""One metric over several domains: code, languages, mathematics, chat. Which domain does a model lose most in?

A domain is a task; its losses, baseline and noise floor are its own. Whether the domains order the models alike is
Kendall's rank correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from compare.comparison.comparison import Comparison
from compare.comparison.loss import LossScale, loss_of, loss_scale
from compare.comparison.point import Point

PREFIX = "domain_"
MIN_MODELS = 3  # two models have one order or the other: their correlation says nothing


@dataclass(frozen=True)
class Loss:
    """A model's loss in one domain, in the unit of its scale; None where figure or original are unknown."""

    value: float | None = None
    error: float | None = None
    in_noise: bool = False


@dataclass(frozen=True)
class ModelLosses:
    """A model's losses, one for each domain, in their order. worst: index of the largest; None if one is unknown."""

    label: str
    family: str
    bpw: float | None
    losses: tuple[Loss, ...]

    @property
    def worst(self) -> int | None:
        values = [loss.value for loss in self.losses]
        known = [value for value in values if value is not None]
        return values.index(max(known)) if len(known) == len(values) > 1 else None


@dataclass(frozen=True)
class Agreement:
    """Kendall's τ between the losses of two domains. models: how many have both."""

    first: str
    second: str
    tau: float
    models: int


class Domains:
    """Comparisons of one metric, each of another task."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        self.comparisons = comparisons
        self.scales: list[LossScale] = [loss_scale(comparison.metric) for comparison in comparisons]
        self.names = [comparison.metric.task.removeprefix(PREFIX) for comparison in comparisons]

    @cached_property
    def models(self) -> list[ModelLosses]:
        """Every model with a comparable figure in any domain, by family and size as in the tables."""
        found: dict[str, tuple[Point, dict[int, Loss]]] = {}
        for number, comparison in enumerate(self.comparisons):
            inside = {id(point) for point in comparison.in_noise}
            for point in comparison.points:
                if point.comparable:
                    _, losses = found.setdefault(point.record.label, (point, {}))
                    losses[number] = self._loss(number, point, id(point) in inside)
        return [
            ModelLosses(
                label,
                point.record.quantization.family,
                point.record.quantization.layer_bpw,
                tuple(losses.get(number, Loss()) for number in range(len(self.comparisons))),
            )
            for label, (point, losses) in found.items()
        ]

    def _loss(self, number: int, point: Point, in_noise: bool) -> Loss:
        if point.record.not_numbers:
            return Loss()
        value, error = loss_of(point, self.comparisons[number], self.scales[number])
        return Loss(value, error, value is not None and in_noise)

    def floors(self) -> list[float | None]:
        """The upper end of each domain's noise floor, as a loss; None where none is known."""
        floors: list[float | None] = []
        for comparison, scale in zip(self.comparisons, self.scales, strict=True):
            floor, ideal = comparison.noise_floor, comparison.metric.row.ideal
            if floor is None or ideal is None:
                floors.append(None)
            else:
                floors.append(max(scale.of(floor.low, ideal), scale.of(floor.high, ideal)))
        return floors

    @cached_property
    def agreement(self) -> list[Agreement]:
        """Kendall's τ-b of every two domains with at least `MIN_MODELS` common models, the lowest first.

        Models of full precision do not take part: their losses are noise.
        """
        from scipy import stats

        baselines = {p.record.label for c in self.comparisons for p in c.points if p.record.is_baseline}
        models = [model for model in self.models if model.label not in baselines]
        found = []
        for a, b in combinations(range(len(self.comparisons)), 2):
            pairs = [(m.losses[a].value, m.losses[b].value) for m in models]
            both = [(x, y) for x, y in pairs if x is not None and y is not None]
            if len(both) >= MIN_MODELS:
                tau = float(stats.kendalltau(*zip(*both, strict=True)).statistic)
                if tau == tau:  # not all models alike in one of the two
                    found.append(Agreement(self.names[a], self.names[b], tau, len(both)))
        return sorted(found, key=lambda pair: pair.tau)
