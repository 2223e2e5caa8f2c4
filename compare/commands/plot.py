"""``compare plot``: the models in one picture, size on x, metric on y."""

from __future__ import annotations

import argparse
from pathlib import Path

from compare.commands import distribution
from compare.commands.common import add_best, add_log_y, add_selection, check_picture_name, options_of
from compare.errors import CompareError
from compare.write import PlotRequest, has_display, write_plot

HELP = "draw the models of result files: size across, metric upwards, one line per family; a panel per --metric"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_best(parser)
    distribution.add_arguments(parser)
    parser.add_argument("--title", help="heading of the picture (default: the metric against the axis)")
    parser.add_argument("--dark", action="store_true", help="light on dark")
    add_log_y(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write FILE.png, .svg, .pdf, or .html (self-contained, figures on hover) instead of opening a window",
    )


def run(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None:
        check_picture_name("-o", output)
    elif not has_display():
        raise CompareError("no display for a window here; name a file: -o plot.png (or .svg, .pdf, .html)")
    request = PlotRequest(output, arguments.title, arguments.dark, arguments.log_y)
    if arguments.distribution is not None:
        return distribution.run(arguments, request)
    write_plot(arguments.paths, options_of(arguments), request)
    return 0
