"""Margins of equivalence: ``--margin 1``, ``--margin perplexity=1%``, ``--margin kld=0.01``.

A margin of a share (an accuracy, an agreement) is in percentage points, of a perplexity in percent, of any other metric
in its own unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from compare.comparison.chosen_metric import ChosenMetric
from compare.errors import CompareError
from compare.metrics import METRICS, LossForm
from compare.text import and_more

_FORM = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<amount>[0-9.]+(?:[eE][-+]?\d+)?)\s*(?P<percent>%?)")


@dataclass(frozen=True)
class MarginOption:
    """One --margin as given. name: of its metric; empty for all shares or, with `percent`, all perplexities."""

    text: str
    name: str
    amount: float
    percent: bool


@dataclass(frozen=True)
class Margin:
    """How far two models may differ and count as equivalent.

    value: for POINTS the difference of shares, 0.01 for one point; for RATIO the relative change, 0.01 for 1 %; else
    in the metric's unit.
    """

    value: float
    form: LossForm
    unit: str = ""

    @property
    def bound(self) -> float:
        """The largest difference, on the logarithmic scale for RATIO: ratios from 1 / (1 + value) to 1 + value."""
        return math.log1p(self.value) if self.form is LossForm.RATIO else self.value

    def __str__(self) -> str:
        if self.form is LossForm.POINTS:
            points = f"{self.value * 100:.10g}"
            return f"{points} point{'' if points == '1' else 's'}"
        if self.form is LossForm.RATIO:
            return f"{self.value * 100:.10g} %"
        return f"{self.value:.10g}{f' {self.unit}' if self.unit else ''}"


def parse_margin(text: str) -> MarginOption:
    """``NAME=AMOUNT``, ``AMOUNT``, each with or without ``%``. Raises ValueError for another form."""
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise ValueError(text)
    amount = float(form["amount"])
    if not 0 < amount < math.inf:
        raise ValueError(text)
    return MarginOption(text.strip(), (form["name"] or "").strip(), amount, bool(form["percent"]))


def form_of(metric: ChosenMetric, shares: bool) -> LossForm:
    """How a metric's margin is given. shares: all its samples are between 0 and 1, which decides without a row."""
    if metric.row.name in METRICS:
        return metric.row.loss
    return LossForm.POINTS if shares else LossForm.DIFFERENCE


def margin_of(metric: ChosenMetric, options: Sequence[MarginOption], shares: bool) -> Margin | None:
    """The margin of a metric: the last one given for it by name, else for its kind; None without one.

    Raises CompareError for a margin in another unit than the metric's.
    """
    form, chosen = form_of(metric, shares), None
    for option in options:
        if _names(option, metric):
            chosen = option
    for option in options if chosen is None else ():
        if not option.name and (option.percent, form) in ((False, LossForm.POINTS), (True, LossForm.RATIO)):
            chosen = option
    if chosen is None:
        return None
    if chosen.percent != (form is LossForm.RATIO) or (form is LossForm.POINTS and chosen.amount >= 100):
        raise CompareError(f"--margin {chosen.text}: the margin of {metric.short} is {_written(metric, form)}")
    return Margin(chosen.amount / (1 if form is LossForm.DIFFERENCE else 100), form, metric.row.unit)


def check_used(options: Sequence[MarginOption], metrics: Sequence[ChosenMetric]) -> None:
    """Raises CompareError for a margin that none of the compared metrics can have."""
    for option in options:
        fits = [m for m in metrics if _names(option, m) or (not option.name and _fits_kind(option, m))]
        if not fits:
            example = _written(metrics[0], form_of(metrics[0], True))
            raise CompareError(
                f"--margin {option.text}: it is for none of the metrics compared "
                f"({and_more([m.label for m in metrics], 4)}); of {metrics[0].short} it is {example}"
            )


def _fits_kind(option: MarginOption, metric: ChosenMetric) -> bool:
    return form_of(metric, True) is (LossForm.RATIO if option.percent else LossForm.POINTS)


def _names(option: MarginOption, metric: ChosenMetric) -> bool:
    """Whether a margin is for this metric by name: ``acc``, ``mmlu/acc``, ``perplexity`` for ``token_perplexity``."""
    names = (metric.metric, metric.short, metric.key, metric.label, f"{metric.task}/{metric.metric}")
    return option.name in names or bool(option.name and metric.metric.endswith(f"_{option.name}"))


def _written(metric: ChosenMetric, form: LossForm) -> str:
    name = metric.metric
    if form is LossForm.POINTS:
        return f"in percentage points below 100: {name}=1"
    if form is LossForm.RATIO:
        return f"in percent of the perplexity: {name}=1%"
    return f"in {metric.row.unit or 'its own unit'}: {name}=0.01"
