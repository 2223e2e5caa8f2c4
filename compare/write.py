"""Draws result files into a picture file or a window, for `compare plot` and at the end of `compare run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compare.comparison.comparison import Comparison, Options
from compare.comparison.load import compare_records, load_comparisons, load_records
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.files import write_output
from compare.metrics import KLD

if TYPE_CHECKING:
    from compare.plot.series import Drawing

PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class PlotRequest:
    """How a picture is drawn and where it goes.

    output: a file whose suffix is in `PICTURE_SUFFIXES`, None for a window. log_y: logarithmic metric axis; None: only
    for the metrics that need one.
    """

    output: Path | None = None
    title: str | None = None
    dark: bool = False
    log_y: bool | None = None


def write_plot(paths: Sequence[Path], options: Options, request: PlotRequest) -> None:
    """Draw the models of result files, one panel per metric. Raises CompareError if there is nothing to draw."""
    comparisons = load_comparisons(paths, options)
    panels = _panels(comparisons, request.log_y)
    from compare.plot import figure
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures.scatter import picture_of

    settings = PlotSettings(request.title, request.dark, request.log_y)
    if request.output is None:
        figure.show(picture_of(panels, settings), settings, say)
        return
    kind = request.output.suffix[1:].lower()
    if kind == "html":
        from compare.report.build import plot_page

        content = plot_page(panels, settings, say)
    else:
        content = figure.render(picture_of(panels, settings), settings, kind, say)
    write_output(request.output, content)
    points, lines = sum(len(d.points) for _, d in panels), sum(len(d.references) for _, d in panels)
    several = f", {len(panels)} panels" if len(panels) > 1 else ""
    say(f"wrote {request.output} ({points} points, {lines} reference lines{several})")


def write_distributions(paths: Sequence[Path], options: Options, request: PlotRequest, name: str) -> None:
    """Draws how the one metric of `options` varies over tokens, by the kind `name` of `pictures`.

    Without a metric in `options`, the KL divergence; the perplexity for a kind that can draw it, if no result has a
    divergence. Raises CompareError for a metric that this kind cannot draw, and if there is nothing to draw.
    """
    from compare.plot import figure
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures import distribution_kind, flag_of

    kind = distribution_kind(name)
    records = load_records(paths)
    diverge = any(metric.partition(",")[0] == KLD for record in records for metric in record.metrics)
    if not options.metrics and (diverge or kind.metrics):
        options = replace(options, metrics=(KLD,))
    (comparison,) = compare_records(records, options)
    if kind.metrics and comparison.metric.metric not in kind.metrics:
        raise CompareError(f"{flag_of(name)} shows {', '.join(kind.metrics)} only, not {comparison.metric.label}")
    settings = PlotSettings(request.title, request.dark, request.log_y)
    picture = kind(comparison, settings)
    for message in picture.shown.left_out:
        say(message)
    if not picture.shown.points:
        raise CompareError(f"nothing to draw: no result has what {flag_of(name)} shows", NOTHING_USABLE)
    if request.output is None:
        figure.show(picture, settings, say)
        return
    write_output(request.output, figure.render(picture, settings, request.output.suffix[1:].lower(), say))
    say(f"wrote {request.output} ({len(picture.shown.points)} models)")


def _panels(comparisons: list[Comparison], log_y: bool | None) -> list[tuple[Comparison, Drawing]]:
    """One panel per metric that can be drawn; prints which metrics and points are left out."""
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


def has_display() -> bool:
    """Whether a window can be expected to open; matplotlib tries the toolkits only later."""
    if os.environ.get("MPLBACKEND", "").lower() in ("agg", "svg", "pdf", "ps", "cairo", "template"):
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
