"""``compare report``: one self-contained HTML page with plots, table, settings and the commands to repeat each run."""

from __future__ import annotations

import argparse
from pathlib import Path

from compare.commands.common import add_choice, add_log_y, add_selection, compare_records, load_records, say
from compare.errors import CompareError

HELP = "write one HTML page: plots, sortable table, settings, the command behind each result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_choice(parser)
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

    records = load_records(arguments, note)
    axes = (
        [arguments.x] if arguments.x else ["memory", "bpw", "vram"] if arguments.budget is not None else ["bpw", "vram"]
    )
    by_axis = [compare_records(arguments, records, axis=axis) for axis in axes]
    comparisons = list(zip(*by_axis, strict=True))  # a metric each, on every axis
    from compare.files import write_atomically
    from compare.report.build import build

    content = build(comparisons, arguments.title, arguments.log_y, notices, note)
    write_atomically(output, content)
    say(f"wrote {output} ({max(len(on[0].points) for on in comparisons)} models)")
    return 0
