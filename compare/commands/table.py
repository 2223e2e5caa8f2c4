"""``compare table``: the models, one a row, for the terminal, Markdown, CSV or JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare.commands.common import add_choice, add_selection, options_of
from compare.comparison.build import SORTS
from compare.comparison.comparison import Comparison
from compare.comparison.load import load_comparisons
from compare.console import say
from compare.errors import CompareError

HELP = "list the models of result files with their size and metric"
_FORMATS = ("terminal", "md", "csv", "json")
_BY_SUFFIX = {".md": "md", ".csv": "csv", ".json": "json", ".txt": "terminal"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_choice(parser)
    parser.add_argument(
        "--versus",
        metavar="LABEL",
        help="differences of every model to the one of this label, paired window by window or document by document, "
        "with 95%% intervals and a mark for those that the data cannot tell apart; needs runs with --log_samples",
    )
    parser.add_argument("--format", choices=_FORMATS, help="default: by the suffix of -o, or terminal")
    parser.add_argument(
        "--sort", choices=SORTS, default="family", help="family, then x (default); x; metric, best first; label"
    )
    parser.add_argument("--title", help="heading of the terminal and Markdown table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")


def run(arguments: argparse.Namespace) -> int:
    chosen = arguments.format or _format_of(arguments.output)
    comparisons = load_comparisons(arguments.paths, options_of(arguments, arguments.sort))
    if arguments.versus is not None:
        _measure(comparisons, arguments.versus)
    from compare.table import formats, terminal

    renderers = {
        "terminal": terminal.render_terminal,
        "md": formats.render_markdown,
        "csv": formats.render_csv,
        "json": formats.render_json,
    }
    if arguments.output is None:
        if chosen == "terminal":
            terminal.print_terminal(comparisons, arguments.title)
        else:
            sys.stdout.write(renderers[chosen](comparisons, arguments.title))
        return 0
    from compare.files import write_output

    text = renderers[chosen](comparisons, arguments.title)
    write_output(arguments.output, text.encode("utf-8", "backslashreplace"))
    models = max(len(comparison.points) for comparison in comparisons)
    say(f"wrote {arguments.output} ({models} models)")
    return 0


def _measure(comparisons: list[Comparison], label: str) -> None:
    """Pair the models; why some have no pair is said. CompareError where none has."""
    from compare.comparison.pairs import check_formed, measure

    found = []
    for comparison in comparisons:
        comparison.pairs = measure(comparison.points, comparison.metric, label)
        found.append(comparison.pairs)
    check_formed(label, found)
    for comparison, versus in zip(comparisons, found, strict=True):
        prefix = f"{comparison.metric.label}: " if len(comparisons) > 1 else ""
        for point in comparison.points:
            if versus.pair(point).reason:
                say(f"{prefix}no pair: {point.record.label}: {versus.pair(point).reason}")


def _format_of(output: Path | None) -> str:
    if output is None:
        return "terminal"
    known = _BY_SUFFIX.get(output.suffix.lower())
    if known is None:
        raise CompareError(f"-o {output}: no format by this suffix; give --format md, csv, json or terminal")
    return known
