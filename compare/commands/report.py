"""``compare report``: one self-contained HTML page with plots, table, settings and the commands to repeat each run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from compare.commands.common import add_best, add_log_y, add_margin, add_selection, check_margins, options_of
from compare.comparison.build import build_comparisons
from compare.comparison.comparison import Comparison, Options
from compare.comparison.load import load_records
from compare.comparison.versus import add_pairs, changed_answers
from compare.console import say
from compare.errors import CompareError
from compare.metrics import KLD
from compare.results.records import Record

HELP = "write one HTML page: plots, sortable table, settings, the command behind each result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_best(parser)
    parser.add_argument(
        "--versus",
        metavar="LABEL",
        help="compare every model with this one, paired by window or document, in the tables too (default: answers are "
        "compared with the full-precision model); needs runs with --log_samples",
    )
    add_margin(parser)
    parser.add_argument("--title", help="heading of the page (default: the metric)")
    add_log_y(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="write the page to FILE.html")


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.suffix.lower() not in (".html", ".htm"):
        raise CompareError(f"-o {output}: expected a name that ends in .html")
    notices: list[str] = []

    def note(message: str) -> None:
        if message not in notices:
            notices.append(message)
            say(message)

    options, margins = options_of(arguments), check_margins(arguments)
    records = load_records(arguments.paths, note)
    axes = (
        [arguments.x] if arguments.x else ["memory", "bpw", "vram"] if arguments.budget is not None else ["bpw", "vram"]
    )
    by_axis = [build_comparisons(records, replace(options, axis=axis)) for axis in axes]
    comparisons = list(zip(*by_axis, strict=True))  # a metric each, on every axis
    divergences = _divergences(replace(options, axis=axes[-1] if arguments.x else "bpw"), records, note)
    answered = changed_answers(records, options, arguments.versus, margins, note)
    if arguments.versus is not None:
        add_pairs([on[0] for on in comparisons], arguments.versus, margins, note, answered)
    from compare.files import write_output
    from compare.report.build import build

    content = build(comparisons, divergences, answered, arguments.title, arguments.log_y, notices, note)
    write_output(output, content)
    say(f"wrote {output} ({max(len(on[0].points) for on in comparisons)} models)")
    return 0


def _divergences(options: Options, records: list[Record], note: Callable[[str], None]) -> list[Comparison]:
    """One comparison per task that was measured against a reference, whatever metric the page shows."""
    tasks = list(dict.fromkeys(r.task for r in records if f"{KLD},none" in r.metrics and r.divergence is not None))
    comparisons = []
    for task in tasks:
        of_task = replace(options, metrics=(f"{task}/{KLD},none",), subtasks=False, mean=False, max_y=None)
        try:
            comparisons += build_comparisons(records, of_task)
        except CompareError as error:  # --mask or --max-x leave nothing of this task
            note(f"no section on the divergence of {task}: {error}")
    for comparison in comparisons:
        for notice in comparison.notices:
            note(notice if notice.startswith("re-run") else f"{comparison.metric.label}: {notice}")
    return comparisons
