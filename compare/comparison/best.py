"""Which models are worth a look: the Pareto frontier, and the best model that fits a memory budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from compare.comparison.axis import Axis
from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.memory import GIB, Budget, Fit, fit, memory, why_unknown
from compare.comparison.point import Point
from compare.text import and_more


def frontier(points: Iterable[Point], higher_is_better: bool) -> list[Point]:
    """The Pareto frontier in order of x: the points that no other point dominates.

    A point dominates another if it is no larger in x and no worse in the metric, and better in one of the two; points
    equal in both are both on the frontier. Only comparable points that have x and metric take part. Standard errors are
    ignored: a point may be dominated by less than the uncertainty of its figure. A model with a figure that is NaN or
    infinite does not take part.
    """
    sign = -1.0 if higher_is_better else 1.0
    sound = [p for p in points if p.comparable and not p.record.not_numbers]
    placed = [(p.x, sign * p.y, p) for p in sound if p.x is not None and p.y is not None]
    placed.sort(key=lambda entry: entry[:2])
    kept: list[Point] = []
    best = (float("inf"), float("inf"))  # metric (lower is better) and x of the last point kept
    for x, cost, point in placed:
        if cost < best[0] or (cost, x) == best:
            kept.append(point)
            best = (cost, x)
    return kept


def frontiers(points: Iterable[Point], metric: ChosenMetric, axis: Axis) -> list[list[Point]]:
    """One frontier; on an axis of bits per weight one per model size: a bit of a larger model takes more memory."""
    higher_is_better = metric.higher_is_better
    assert higher_is_better is not None  # checked when the comparison was built
    by_size: dict[object, list[Point]] = defaultdict(list)
    for point in points:
        by_size[point.size if axis.per_weight else None].append(point)
    lines = [frontier(same, higher_is_better) for same in by_size.values()]
    return [line for line in lines if line]


@dataclass(frozen=True)
class BudgetVerdict:
    """Comparable points by whether they fit `budget`; `best` has the best metric of those that do."""

    budget: Budget
    best: Point | None
    fitting: list[Point]
    too_large: list[Point]
    unknown: list[Point]

    def lines(self, metric: ChosenMetric) -> list[str]:
        """The verdict for the user; names every model that does not or may not fit."""
        lines = [self.headline(metric) + (f"; it needs {self.need()}" if self.best else "")]
        if self.too_large:
            lines.append(f"too large for {self.budget.gib:g} GB: {and_more([p.record.label for p in self.too_large])}")
        lines += [f"unknown whether it fits: {p.record.label}: {why_unknown(p.record.quantization)}"
                  for p in self.unknown[:20]]  # fmt: skip
        if len(self.unknown) > 20:
            lines.append(f"unknown whether they fit: {len(self.unknown) - 20} more")
        return lines

    def headline(self, metric: ChosenMetric) -> str:
        """``best within 8 GB …: Q4_K_M, perplexity 8.44``."""
        if self.best is None:
            return f"no model is known to fit {self.budget}"
        name = metric.name.lower()
        return f"best within {self.budget}: {self.best.record.label}, {name} {self.best.y:.5g}"

    def need(self) -> str:
        """``4.58 GB of weights + 1.00 GB of KV cache (bfloat16)`` for the best model; empty without one."""
        q = self.best.record.quantization if self.best is not None else None
        needed = memory(q, self.budget.context) if q is not None else None
        if q is None or needed is None:
            return ""
        kind = f" ({q.kv_cache_dtype})" if q.kv_cache_dtype else ""
        most = "" if needed.exact else "at most "
        return f"{needed.weights / GIB:.2f} GB of weights + {most}{needed.cache / GIB:.2f} GB of KV cache{kind}"


def judge(points: Iterable[Point], metric: ChosenMetric, budget: Budget) -> BudgetVerdict:
    """Sorts the comparable points into those that fit, do not fit, or are unknown, and finds the best that fits."""
    by_fit: dict[Fit, list[Point]] = {each: [] for each in Fit}
    for point in points:
        if point.comparable and point.y is not None:
            by_fit[fit(point.record.quantization, budget)].append(point)
    sign = -1.0 if metric.higher_is_better else 1.0
    best = min(
        (p for p in by_fit[Fit.FITS] if not p.record.not_numbers),
        key=lambda p: (sign * (p.y or 0.0), _needed(p, budget), p.record.label),
        default=None,
    )
    return BudgetVerdict(budget, best, by_fit[Fit.FITS], by_fit[Fit.TOO_LARGE], by_fit[Fit.UNKNOWN])


def _needed(point: Point, budget: Budget) -> int:
    needed = memory(point.record.quantization, budget.context)
    return needed.total if needed is not None else 0
