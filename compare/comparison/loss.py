"""How much a model loses against the original, in the unit in which people say it.

Nats of KL divergence, per cent of perplexity, points of accuracy: what `compare choose --max-loss` takes and its answer
says. A loss below zero is a figure better than the original's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.errors import CompareError
from compare.metrics import LossForm
from compare.text import shorten


@dataclass(frozen=True)
class LossScale:
    """The losses of one metric: `unit` as it is written after a number, with its blank."""

    metric: ChosenMetric
    form: LossForm
    unit: str

    def of(self, value: float, original: float) -> float:
        """The loss of a figure against the original's, in `unit`; positive is worse."""
        if self.form is LossForm.RATIO:
            return (value / original - 1.0) * 100
        worse = original - value if self.metric.higher_is_better else value - original
        return worse * 100 if self.form is LossForm.POINTS else worse

    def error(self, stderr: float, original: float) -> float:
        """The standard error of a loss, from that of the figure; the original counts as exact."""
        if self.form is LossForm.RATIO:
            return stderr / original * 100
        return stderr * 100 if self.form is LossForm.POINTS else stderr

    def text(self, loss: float, error: float | None = None) -> str:
        """``0.041 ± 0.0006 nats``, ``4.5 %``, ``1.2 points``: three digits, the error two."""
        shown = f"{loss:.3g}" if error is None else f"{loss:.3g} ± {error:.2g}"
        return f"{shown}{self.unit}"

    def limit(self, text: str) -> float:
        """Reads ``--max-loss``: a number in `unit`, which may follow it. Raises CompareError for anything else."""
        number, unit = text.strip(), self.unit.strip()
        if unit and number.casefold().endswith(unit.casefold()):
            number = number[: -len(unit)].strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            named = f"a number of {unit}" if unit else "a number"
            raise CompareError(
                f"--max-loss {shorten(text, 40)}: expected {named}, since the loss is of {self.metric.label}, "
                f"e.g. --max-loss '{self.text(1)}'"
            )
        return value


def loss_scale(metric: ChosenMetric) -> LossScale:
    """The scale of a metric's losses. Raises CompareError for a metric of unknown direction."""
    row = metric.row
    if metric.higher_is_better is None:
        raise CompareError(
            f"--metric {metric.label}: nothing says whether a higher value is better; choose by another metric"
        )
    units = {LossForm.RATIO: " %", LossForm.POINTS: " points"}
    return LossScale(metric, row.loss, units.get(row.loss, f" {row.unit}" if row.unit else ""))


def loss_of(point: Point, comparison: Comparison, scale: LossScale) -> tuple[float | None, float | None]:
    """A point's loss and its standard error, in the scale's unit; None where its figure or the original's is unknown.

    A perplexity's own error is mostly that of the text, which the original shares, and says nothing of the loss's: only
    pairs do. So there is an error only where the metric itself compares with a reference.
    """
    row, baseline = comparison.metric.row, comparison.baselines.get(point.size)
    original = row.ideal if row.needs_reference else baseline.y if baseline is not None else None
    if original is None or point.y is None:
        return None, None
    known = row.needs_reference and point.stderr is not None
    return scale.of(point.y, original), scale.error(point.stderr or 0.0, original) if known else None
