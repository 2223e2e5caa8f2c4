"""Paths to comparisons: reads results, builds comparisons, reports what was left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from compare.comparison.build import build_comparisons
from compare.comparison.comparison import Comparison, Options
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.results.records import Record


def load_comparisons(paths: Sequence[Path], options: Options) -> list[Comparison]:
    """One comparison per metric; reports on stderr what was skipped, replaced or left out.

    Raises CompareError if there is no usable result or the options do not fit the records.
    """
    return compare_records(load_records(paths), options)


def compare_records(records: list[Record], options: Options) -> list[Comparison]:
    """One comparison per metric, as `load_comparisons` does, of records that are read already."""
    comparisons = build_comparisons(records, options)
    for comparison in comparisons:
        for notice in comparison.notices:
            say(notice)
        if comparison.verdict is not None:
            for line in comparison.verdict.lines(comparison.metric):
                say(line if len(comparisons) == 1 else f"{comparison.metric.label}: {line}")
    return comparisons


def load_records(paths: Sequence[Path], note: Callable[[str], None] = say) -> list[Record]:
    """The records in result files and folders; skipped files go to `note`. Raises CompareError if there are none."""
    from compare.results.reading import read_results

    reading = read_results(paths)
    for problem in reading.problems:
        note(f"skipped: {problem.path}: {problem.reason}")
    if not reading.records:
        raise CompareError(
            "no usable result file (results_*.json, NAME_DATE.json …) in the paths given", NOTHING_USABLE
        )
    return reading.records
