"""The mean of several tasks: which tasks count, the figure and its error, one record per model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compare.comparison.chosen_metric import MEAN, ChosenMetric
from compare.errors import NOTHING_USABLE, CompareError
from compare.results.groups import leaves
from compare.results.records import MetricValue, ProtocolRecord, Record
from compare.results.values import number
from compare.text import and_more


@dataclass(frozen=True)
class Part:
    """One task of one model; `record` is None where the model has no such figure."""

    metric: ChosenMetric
    record: Record | None

    @property
    def figure(self) -> MetricValue:
        return self.record.metric(self.metric.key) if self.record is not None else MetricValue(None)


@dataclass(frozen=True)
class Averaged:
    """One model: its mean as a record, and every task asked for, including those left out of the mean."""

    record: Record
    parts: tuple[Part, ...]


def mean(figures: Sequence[MetricValue]) -> MetricValue:
    """Σ value / k with the standard error √(Σ stderr²) / k: k estimates from independent samples.

    The value is None if one of the values is, the error if one of the errors is; both if the sum overflows a float.
    """
    values = [f.value for f in figures if f.value is not None]
    errors = [f.stderr for f in figures if f.stderr is not None]
    k = len(figures)
    value = number(math.fsum(v / k for v in values)) if len(values) == k else None
    stderr = number(math.hypot(*errors) / k) if value is not None and len(errors) == k else None
    return MetricValue(value, stderr)


def average(
    records: Sequence[Record], metrics: Sequence[ChosenMetric], notices: list[str]
) -> tuple[ChosenMetric, list[Averaged]]:
    """The mean over those of `metrics` that every model with any of them has; `notices` names them and the others.

    Raises CompareError where there is nothing to average, or the figures have no common mean.
    """
    by_model: dict[tuple[str, ...], dict[ChosenMetric, Record]] = defaultdict(dict)
    for metric in metrics:
        for record in records:
            if record.task == metric.task and metric.key in record.metrics:
                by_model[record.identity[1:]][metric] = record
    kept = [metric for metric in metrics if all(metric in own for own in by_model.values())]
    for metric in metrics:
        if metric not in kept:
            lacking = [next(iter(own.values())).label for own in by_model.values() if metric not in own]
            notices.append(f"left out of the mean: {metric.label}: not in {and_more(lacking)} (--mask chooses models)")
    _check(list(metrics), kept, by_model)
    combined = ChosenMetric("", MEAN, kept[0].higher_is_better, tuple(kept))
    notices.append(f"{MEAN} over {len(kept)} tasks: {', '.join(metric.label for metric in kept)}")
    result = []
    for own in by_model.values():
        figure = mean([own[metric].metric(metric.key) for metric in kept])
        latest = max((own[metric] for metric in kept), key=lambda r: r.date)
        record = replace(
            latest,
            task=MEAN,
            alias="",
            metrics={MEAN: replace(figure, higher_is_better=combined.higher_is_better)},
            protocol=ProtocolRecord(harness=tuple(_settings(metric, own[metric]) for metric in kept)),
        )
        result.append(Averaged(record, tuple(Part(metric, own.get(metric)) for metric in metrics)))
    return combined, result


def _settings(metric: ChosenMetric, record: Record) -> str:
    return f"{metric.label}: {', '.join(record.comparability(metric.metric))}"


def _check(
    metrics: list[ChosenMetric],
    kept: list[ChosenMetric],
    by_model: dict[tuple[str, ...], dict[ChosenMetric, Record]],
) -> None:
    """Raises CompareError where `kept` has no mean: too few, of different direction, or on different scales."""
    if len(metrics) < 2:
        raise CompareError(
            "--mean needs at least two metrics: --metric A --metric B, or --metric GROUP/METRIC --subtasks"
        )
    if len(kept) < 2:
        common = f"only {kept[0].label} is" if kept else "none is"
        raise CompareError(
            f"--mean: of {and_more([m.label for m in metrics])} {common} in every model's results; leave a task out, "
            "or choose models with --mask",
            NOTHING_USABLE,
        )
    if len({metric.higher_is_better for metric in kept}) > 1:
        directions = {True: "higher is better", False: "lower is better", None: "direction unknown"}
        listed = and_more([f"{m.label} ({directions[m.higher_is_better]})" for m in kept])
        raise CompareError(f"--mean: figures of different direction have no mean: {listed}")
    values = [r.metric(m.key).value for own in by_model.values() for m, r in own.items() if m in kept]
    if len({metric.metric for metric in kept}) > 1 and not all(v is None or 0 <= v <= 1 for v in values):
        raise CompareError(
            f"--mean: these are on different scales (different metrics are averaged between 0 and 1 only): "
            f"{and_more([m.label for m in kept])}"
        )
    _check_once(kept, by_model)


def _check_once(kept: list[ChosenMetric], by_model: dict[tuple[str, ...], dict[ChosenMetric, Record]]) -> None:
    """Raises CompareError if a task counts twice: by a group and its own subtask, or two filters or metrics of it."""
    owner: dict[str, ChosenMetric] = {}
    for metric in kept:
        tree = next(iter(by_model.values()))[metric].groups
        for leaf in leaves(tree, metric.task):
            other = owner.setdefault(leaf, metric)
            if other is not metric:
                raise CompareError(
                    f"--mean: {other.label} and {metric.label} both contain {leaf}, which would count twice; name one"
                )
