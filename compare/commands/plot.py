"""``compare plot``: the models in one picture, size across, metric upwards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from compare.commands import distribution
from compare.commands.common import add_choice, add_log_y, add_selection
from compare.comparison.load import load_comparisons
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError

if TYPE_CHECKING:
    from compare.comparison.comparison import Comparison
    from compare.plot.series import Drawing

HELP = "draw the models of result files: size across, metric upwards, one line a family; a panel a --metric"
_SUFFIXES = (".png", ".svg", ".pdf", ".html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_choice(parser)
    distribution.add_arguments(parser)
    parser.add_argument("--title", help="heading of the picture (default: the metric against the axis)")
    parser.add_argument("--dark", action="store_true", help="light on dark")
    add_log_y(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write FILE.png, .svg, .pdf, or .html (self-contained; hover tells more) instead of opening a window",
    )


def run(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        raise CompareError(f"-o {output}: expected a name that ends in .png, .svg, .pdf or .html")
    if output is None and not _has_display():
        raise CompareError("no display for a window here; name a file: -o plot.png (or .svg, .pdf, .html)")
    if arguments.spread or arguments.histogram:
        return distribution.run(arguments, output)
    comparisons = load_comparisons(arguments)
    panels = _panels(comparisons, arguments.log_y)
    from compare.plot import figure
    from compare.plot.pictures.scatter import picture_of

    settings = figure.PlotSettings(title=arguments.title, dark=arguments.dark)
    if output is None:
        figure.show(picture_of(panels, settings), settings, say)
        return 0
    from compare.files import write_atomically

    kind = output.suffix[1:].lower()
    if kind == "html":
        from compare.report.build import plot_page

        content = plot_page(panels, settings, say)
    else:
        content = figure.render(picture_of(panels, settings), settings, kind, say)
    write_atomically(output, content)
    points, lines = sum(len(d.points) for _, d in panels), sum(len(d.references) for _, d in panels)
    inside = f", {len(panels)} panels" if len(panels) > 1 else ""
    say(f"wrote {output} ({points} points, {lines} reference lines{inside})")
    return 0


def _panels(comparisons: list[Comparison], log_y: bool | None) -> list[tuple[Comparison, Drawing]]:
    """What can be drawn, a panel a metric; what cannot is said."""
    from compare.plot import series

    panels = []
    for comparison in comparisons:
        drawing = series.arrange(comparison, log_y)
        prefix = f"{comparison.metric.label}: " if len(comparisons) > 1 else ""
        for message in drawing.left_out:
            say(f"{prefix}{message}")
        if drawing.points or drawing.references:
            panels.append((comparison, drawing))
        elif prefix:
            say(f"not drawn: {comparison.metric.label}: no result has both the metric and a place on the x axis")
    if not panels:
        raise CompareError("nothing to draw: no result has both the metric and a place on the x axis", NOTHING_USABLE)
    return panels


def _has_display() -> bool:
    """Whether a window can be expected to open. Toolkits are tried later, by matplotlib."""
    if os.environ.get("MPLBACKEND", "").lower() in ("agg", "svg", "pdf", "ps", "cairo", "template"):
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
