"""From paths to comparisons: reads results, builds comparisons, says what was left out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compare.comparison.axis import MEMORY
from compare.comparison.build import build_comparisons
from compare.comparison.comparison import Comparison, Options
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.results.records import Record


def load_comparisons(arguments: argparse.Namespace, sort: str = "family") -> list[Comparison]:
    """Read the files, build a comparison a metric, and say on stderr what was skipped, replaced or left out."""
    comparisons = compare_records(arguments, load_records(arguments), sort=sort)
    for comparison in comparisons:
        for notice in comparison.notices:
            say(notice)
        if comparison.verdict is not None:
            for line in comparison.verdict.lines(comparison.metric):
                say(line if len(comparisons) == 1 else f"{comparison.metric.label}: {line}")
    return comparisons


def load_records(arguments: argparse.Namespace, note: Callable[[str], None] | None = None) -> list[Record]:
    """The records in the paths given; what was skipped is said on stderr, or to `note`."""
    note = note or say
    _check_memory(arguments)
    from compare.results.reading import read_results

    reading = read_results(arguments.paths)
    for problem in reading.problems:
        note(f"skipped: {problem.path}: {problem.reason}")
    if not reading.records:
        raise CompareError("no usable result file (results_*.json) in the paths given", NOTHING_USABLE)
    return reading.records


def compare_records(arguments: argparse.Namespace, records: list[Record], **changes: Any) -> list[Comparison]:
    """The comparisons that the arguments ask for, one a metric; `changes` are fields of `Options` that go before."""
    budget = arguments.budget
    options = Options(
        metrics=tuple(arguments.metric),
        subtasks=arguments.subtasks,
        mean=arguments.mean,
        axis=arguments.x or (MEMORY if budget is not None else "bpw"),
        pareto=arguments.pareto,
        budget=budget,
        context=arguments.context,
        mask=arguments.mask,
        max_x=arguments.max_x,
        max_y=arguments.max_y,
        allow_mixed=arguments.allow_mixed,
    )
    return build_comparisons(records, replace(options, **changes))


def _check_memory(arguments: argparse.Namespace) -> None:
    if arguments.context is None and (arguments.budget is not None or arguments.x == MEMORY):
        asked = "--budget" if arguments.budget is not None else "--x memory"
        raise CompareError(f"{asked} needs --context TOKENS, what the KV cache shall hold, e.g. --context 8192")
    if arguments.context is not None and arguments.budget is None and arguments.x != MEMORY:
        raise CompareError("--context is for --budget GB or --x memory; add one of them")
