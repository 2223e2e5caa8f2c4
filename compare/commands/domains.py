"""``compare domains``: one metric over several texts, a column each."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from compare.commands.common import add_budget, add_selection, options_of, show_text
from compare.comparison.build import build_comparisons
from compare.comparison.domains import PREFIX, Domains
from compare.comparison.load import load_records
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import KLD, PERPLEXITY
from compare.results.records import Record

HELP = "one metric over several domains (domain_code, domain_german …): which one does a model lose most in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_budget(parser)
    parser.add_argument(
        "--tasks", metavar="A,B", help=f"the tasks to put side by side (default: all whose name begins with {PREFIX})"
    )
    parser.add_argument("--format", choices=("md", "json"), default="md")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    if options.mean or options.subtasks or len(options.metrics) > 1:
        raise CompareError(
            "compare domains shows one metric of several tasks: give one --metric, no --mean, --subtasks"
        )
    records = load_records(arguments.paths)
    metric = options.metrics[0] if options.metrics else _default(records)
    tasks = _tasks(records, metric, arguments.tasks)
    comparisons = build_comparisons(records, replace(options, metrics=tuple(f"{task}/{metric}" for task in tasks)))
    for notice in comparisons[0].notices:
        say(notice)
    from compare.table import domains as table

    domains = Domains(comparisons)
    text = table.render_json(domains) if arguments.format == "json" else table.render_markdown(domains)
    show_text(text, arguments.output, f" ({len(domains.names)} domains)")
    return 0


def _default(records: list[Record]) -> str:
    return KLD if any(f"{KLD},none" in r.metrics and r.task.startswith(PREFIX) for r in records) else PERPLEXITY


def _tasks(records: list[Record], metric: str, named: str | None) -> list[str]:
    """The tasks to show, in the order of the files. Raises CompareError if fewer than two have the metric."""
    having = list(dict.fromkeys(
        r.task for r in records if any(metric in (key, key.partition(",")[0]) for key in r.metrics)
    ))  # fmt: skip
    asked = [task.strip() for task in named.split(",") if task.strip()] if named else None
    missing = [task for task in asked or [] if task not in having]
    if missing:
        raise CompareError(f"--tasks {', '.join(missing)}: no result of it has {metric}; tasks: {', '.join(having)}")
    tasks = asked or [task for task in having if task.startswith(PREFIX)]
    if len(tasks) < 2:
        raise CompareError(
            f"no two tasks {PREFIX}… with {metric} in these files; run lm_eval --tasks domains, or give --tasks A,B",
            NOTHING_USABLE,
        )
    return tasks
