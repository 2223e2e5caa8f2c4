"""The mean of several tasks: which tasks count, the figure and its error, one record a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compare.comparison.metric_choice import MEAN, MetricChoice
from compare.errors import NOTHING_USABLE, CompareError
from compare.results.groups import leaves
from compare.results.records import Metric, ProtocolRecord, Record
from compare.results.values import number
from compare.text import and_more


@dataclass(frozen=True)
class Part:
    """One task of one model; `record` is None where the model has no such figure."""

    choice: MetricChoice
    record: Record | None

    @property
    def figure(self) -> Metric:
        return self.record.metric(self.choice.key) if self.record is not None else Metric(None)


@dataclass(frozen=True)
class Averaged:
    """One model: its mean as a record, and every task that was asked for, those left out of the mean too."""

    record: Record
    parts: tuple[Part, ...]


def mean(figures: Sequence[Metric]) -> Metric:
    """Σ value / k with the standard error √(Σ stderr²) / k: k estimates from independent samples.

    The value is None where one is, the error where one is; both where the sum is beyond a float.
    """
    values = [f.value for f in figures if f.value is not None]
    errors = [f.stderr for f in figures if f.stderr is not None]
    k = len(figures)
    value = number(math.fsum(v / k for v in values)) if len(values) == k else None
    stderr = number(math.hypot(*errors) / k) if value is not None and len(errors) == k else None
    return Metric(value, stderr)


def average(
    records: Sequence[Record], choices: Sequence[MetricChoice], notices: list[str]
) -> tuple[MetricChoice, list[Averaged]]:
    """The mean over those of `choices` that every model with any of them has; `notices` names it, and what is left out.

    Raises CompareError where there is nothing to average, or figures that have no common mean.
    """
    by_model: dict[tuple[str, ...], dict[MetricChoice, Record]] = defaultdict(dict)
    for choice in choices:
        for record in records:
            if record.task == choice.task and choice.key in record.metrics:
                by_model[record.identity[1:]][choice] = record
    kept = [choice for choice in choices if all(choice in found for found in by_model.values())]
    for choice in choices:
        if choice not in kept:
            lacking = [next(iter(f.values())).label for f in by_model.values() if choice not in f]
            notices.append(f"left out of the mean: {choice.label}: not in {and_more(lacking)} (--mask chooses models)")
    _check(list(choices), kept, by_model)
    combined = MetricChoice("", MEAN, kept[0].higher_is_better, tuple(kept))
    notices.append(f"{MEAN} over {len(kept)} tasks: {', '.join(choice.label for choice in kept)}")
    result = []
    for found in by_model.values():
        figure = mean([found[choice].metric(choice.key) for choice in kept])
        first = max((found[choice] for choice in kept), key=lambda r: r.date)
        record = replace(
            first,
            task=MEAN,
            alias="",
            metrics={MEAN: replace(figure, higher_is_better=combined.higher_is_better)},
            protocol=ProtocolRecord(harness=tuple(_settings(choice, found[choice]) for choice in kept)),
        )
        result.append(Averaged(record, tuple(Part(choice, found.get(choice)) for choice in choices)))
    return combined, result


def _settings(choice: MetricChoice, record: Record) -> str:
    return f"{choice.label}: {', '.join(record.comparability(choice.metric))}"


def _check(
    choices: list[MetricChoice],
    kept: list[MetricChoice],
    by_model: dict[tuple[str, ...], dict[MetricChoice, Record]],
) -> None:
    if len(choices) < 2:
        raise CompareError("--mean is of several: --metric A --metric B, or --metric GROUP/METRIC --subtasks")
    if len(kept) < 2:
        common = f"only {kept[0].label} is" if kept else "none is"
        raise CompareError(
            f"--mean: of {and_more([c.label for c in choices])} {common} in every model's results; leave a task out, "
            "or choose models with --mask",
            NOTHING_USABLE,
        )
    if len({choice.higher_is_better for choice in kept}) > 1:
        said = {True: "higher is better", False: "lower is better", None: "not said which is better"}
        words = and_more([f"{c.label} ({said[c.higher_is_better]})" for c in kept])
        raise CompareError(f"--mean: figures of different direction have no mean: {words}")
    values = [r.metric(c.key).value for found in by_model.values() for c, r in found.items() if c in kept]
    if len({choice.metric for choice in kept}) > 1 and not all(v is None or 0 <= v <= 1 for v in values):
        raise CompareError(
            f"--mean: these are on different scales (different metrics are averaged between 0 and 1 only): "
            f"{and_more([c.label for c in kept])}"
        )
    _check_once(kept, by_model)


def _check_once(kept: list[MetricChoice], by_model: dict[tuple[str, ...], dict[MetricChoice, Record]]) -> None:
    """No question may count twice: not a group beside its own subtask, nor two filters or metrics of a task."""
    owner: dict[str, MetricChoice] = {}
    for choice in kept:
        trees = next(iter(by_model.values()))[choice].groups
        for leaf in leaves(trees, choice.task):
            other = owner.setdefault(leaf, choice)
            if other is not choice:
                raise CompareError(
                    f"--mean: {other.label} and {choice.label} both hold {leaf}, which would count twice; name one"
                )
