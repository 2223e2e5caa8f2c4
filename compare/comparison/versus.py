"""Pairs in the comparisons of a command, as --versus and --margin ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Comparison, Options
from compare.comparison.margins import MarginOption, check_used
from compare.comparison.pairs import check_formed, measure_pairs
from compare.errors import CompareError
from compare.metrics import LossForm, metric_named
from compare.results.groups import leaves
from compare.results.records import Record
from compare.results.samples import NoSamples, samples_file

Say = Callable[[str], None]


def add_pairs(
    comparisons: Sequence[Comparison], label: str, margins: Sequence[MarginOption], note: Say,
    others: Sequence[Comparison] = (),
) -> None:  # fmt: skip
    """Pairs every model of `comparisons` with the one called `label`; `note` gets a line for each without a pair.

    others: comparisons of the same command that have their pairs. Raises CompareError if no pair at all can be formed,
    and for a margin that none of the metrics can have.
    """
    check_used(margins, [comparison.metric for comparison in (*comparisons, *others)])
    for comparison in comparisons:
        comparison.pairs = measure_pairs(comparison.points, comparison.metric, label, margins)
    formed = [comparison.pairs for comparison in (*comparisons, *others) if comparison.pairs is not None]
    check_formed(label, formed)
    for comparison in comparisons:
        _note_reasons(comparison, f"{comparison.metric.label}: " if len(comparisons) > 1 else "", note)
        if margins and comparison.pairs is not None and comparison.pairs.margin is None:
            note(f"note: {comparison.metric.label}: no --margin is for it, so equivalence is not tested")


def _note_reasons(comparison: Comparison, prefix: str, note: Say) -> None:
    assert comparison.pairs is not None
    for point in comparison.points:
        if comparison.pairs.pair(point).reason:
            note(f"{prefix}no pair: {point.record.label}: {comparison.pairs.pair(point).reason}")


def changed_answers(
    records: Sequence[Record], options: Options, label: str | None, margins: Sequence[MarginOption], note: Say
) -> list[Comparison]:
    """A comparison with its pairs for each accuracy, whatever metric is compared, of which two runs logged samples.

    label: the model to compare with; None: the baseline. `note` gets a line for what has no pair.
    """
    found = []
    for name in _accuracies(records):
        own = replace(options, metrics=(name,), subtasks=False, mean=False, max_y=None, axis="bpw", context=None,
                      budget=None)  # fmt: skip
        try:
            comparison = build_comparison(list(records), own)
            versus = label or (comparison.baseline.record.label if comparison.baseline is not None else None)
            if versus is None:
                note(f"no answers of {name} are compared: no result says that it is in full precision; name the model "
                     "to compare with: --versus LABEL")  # fmt: skip
                continue
            comparison.pairs = measure_pairs(comparison.points, comparison.metric, versus, margins)
        except CompareError as error:  # --mask leaves nothing of this task, or the label is not among its models
            note(f"no answers of {name} are compared: {error}")
            continue
        if any(pair.flips is not None for pair in comparison.pairs.pairs.values()):
            _note_reasons(comparison, f"{comparison.metric.label}: ", note)
            found.append(comparison)
    return found


def _accuracies(records: Sequence[Record]) -> Iterator[str]:
    """``TASK/METRIC,FILTER`` of the accuracies of tasks and whole groups of which at least two runs have samples."""
    below = {child for record in records for children in record.groups.values() for child in children}
    logged: dict[str, int] = {}
    for record in records:
        if record.task in below or record.protocol.has_windows or not _has_samples(record):
            continue
        for key in record.metrics:
            row = metric_named(key.partition(",")[0])
            if row.loss is LossForm.POINTS and not row.needs_reference:
                logged[f"{record.task}/{key}"] = logged.get(f"{record.task}/{key}", 0) + 1
    return (name for name, runs in logged.items() if runs > 1)


def _has_samples(record: Record) -> bool:
    try:
        return samples_file(record, leaves(record.groups, record.task)[0]).is_file()
    except (NoSamples, OSError):
        return False
