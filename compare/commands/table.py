"""``compare table``: one row per model, for the terminal, Markdown, CSV or JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compare.commands.common import add_best, add_margin, add_selection, check_margins, options_of, show_text
from compare.comparison.build import SORTS
from compare.comparison.comparison import Comparison
from compare.comparison.load import load_comparisons
from compare.comparison.margins import MarginOption
from compare.comparison.versus import add_pairs
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.text import and_more

HELP = "list the models of result files with their size and metric"
_FORMATS = ("terminal", "md", "csv", "json")
_BY_SUFFIX = {".md": "md", ".csv": "csv", ".json": "json", ".txt": "terminal"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_best(parser)
    parser.add_argument(
        "--versus",
        metavar="LABEL",
        help="the difference of every model from the one with this label, paired by window or document, with 95%% "
        "intervals and a mark for those that the data cannot tell apart; needs runs with --log_samples",
    )
    add_margin(parser)
    parser.add_argument(
        "--choose",
        action="store_true",
        help="say below the table which model to run (compare choose), not in CSV or JSON",
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="the metric at the first and last positions of the windows, and its slope per doubling of the position, "
        "with 95%% intervals",
    )
    parser.add_argument("--format", choices=_FORMATS, help="default: by the suffix of -o, or terminal")
    parser.add_argument(
        "--sort", choices=SORTS, default="family", help="family, then x (default); x; metric, best first; label"
    )
    parser.add_argument("--title", help="heading of the terminal and Markdown table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")


def run(arguments: argparse.Namespace) -> int:
    table_format = arguments.format or _format_of(arguments.output)
    margins = check_margins(arguments)
    if arguments.by_position and arguments.mean:
        raise CompareError("--by-position shows the windows of one task, so it cannot be combined with --mean")
    options = replace(options_of(arguments, arguments.sort), by_position=arguments.by_position)
    comparisons = load_comparisons(arguments.paths, options)
    if arguments.by_position:
        _check_positions(comparisons)
    if arguments.versus is not None:
        _add_pairs(comparisons, arguments.versus, margins)
    answer = _answer(comparisons, table_format) if arguments.choose else ""
    from compare.table import formats, terminal

    renderers = {
        "terminal": terminal.render_terminal,
        "md": formats.render_markdown,
        "csv": formats.render_csv,
        "json": formats.render_json,
    }
    if arguments.output is None and table_format == "terminal":
        terminal.print_terminal(comparisons, arguments.title)
        sys.stdout.write(answer)
        return 0
    models = max(len(comparison.points) for comparison in comparisons)
    text = renderers[table_format](comparisons, arguments.title) + answer
    show_text(text, arguments.output, f" ({models} models)")
    return 0


def _answer(comparisons: list[Comparison], table_format: str) -> str:
    """What `compare choose` says, one sentence a paragraph. Raises CompareError for CSV and JSON."""
    if table_format in ("csv", "json"):
        raise CompareError(f"--choose has no place in {table_format}; use compare choose --format json")
    from compare.comparison.choice import Answer
    from compare.text import markdown, show_controls

    texts = [show_controls(s.text) for comparison in comparisons for s in Answer(comparison).sentences()]
    return "".join(f"{markdown(text)}\n\n" if table_format == "md" else f"{text}\n" for text in texts)


def _check_positions(comparisons: list[Comparison]) -> None:
    """Raises CompareError if no result has figures by position."""
    from compare.comparison.by_position import curve_of

    if not any(curve_of(point, c.metric) is not None for c in comparisons for point in c.points):
        names = and_more([comparison.metric.label for comparison in comparisons])
        raise CompareError(
            f"--by-position: no result file holds {names} by position; our adapters record token_perplexity, kld, "
            "top1_agreement and ppl_ratio of tasks with token windows: run the task again",
            NOTHING_USABLE,
        )


def _add_pairs(comparisons: list[Comparison], label: str, margins: Sequence[MarginOption]) -> None:
    """Pairs every model with the baseline `label`, by position too if that is asked for.

    Raises CompareError if no pair at all can be formed.
    """
    from compare.comparison.by_position import measure_position_pairs

    for comparison in comparisons:
        if comparison.options.by_position:
            comparison.position_pairs = measure_position_pairs(comparison.points, comparison.metric, label)
    try:
        add_pairs(comparisons, label, margins, say)
    except CompareError as error:  # pairs of means need samples; those by position do not
        formed = any(c.position_pairs is not None and c.position_pairs.pairs for c in comparisons)
        if error.exit_code != NOTHING_USABLE or not formed:
            raise
        for comparison in comparisons:
            comparison.pairs = None
        say(str(error))


def _format_of(output: Path | None) -> str:
    if output is None:
        return "terminal"
    by_suffix = _BY_SUFFIX.get(output.suffix.lower())
    if by_suffix is None:
        raise CompareError(f"-o {output}: no format has this suffix; give --format md, csv, json or terminal")
    return by_suffix
