"""Puts the page together: the interactive plot alone, or the whole report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape

from compare.comparison.comparison import Comparison
from compare.plot.captions import subtitle, title_of
from compare.plot.figure import PlotSettings
from compare.plot.pictures.panels import title_of_all
from compare.plot.series import Drawing, arrange
from compare.report import content, divergence
from compare.report.page import page
from compare.report.pictures import palette, picture
from compare.text import clean

Say = Callable[[str], None]


def plot_page(panels: Sequence[tuple[Comparison, Drawing]], settings: PlotSettings, say: Say) -> bytes:
    """The plots as a page of their own, with what each point says on hover, touch and focus."""
    one = len(panels) == 1
    body = ""
    colours: dict[str, str] = {}
    for number, (comparison, drawing) in enumerate(panels, 1):
        own = settings if one else replace(settings, title=comparison.metric.label)
        body += picture(comparison, drawing, own, number, say)
        colours |= palette(drawing)
    title = title_of(panels[0][0], settings.title) if one else title_of_all(panels, settings.title)
    heading = "" if one else f"<header><h1>{escape(title)}</h1></header>"
    return page(title, heading + body, colours, settings.dark, bare=True)


def build(
    comparisons: Sequence[Sequence[Comparison]],
    divergences: Sequence[Comparison],
    title: str | None,
    log_y: bool | None,
    notices: list[str],
    note: Say,
) -> bytes:
    """The report; `comparisons` are, a metric each, the same results on each axis that is drawn; `divergences` those of
    each task that was measured against a reference.

    notices: what was said so far; `note` adds to it.
    """
    one = len(comparisons) == 1
    plots, colours = _plots(comparisons, log_y, note)
    plotted = {by_axis[0].metric for by_axis in comparisons}
    diverged = ""
    for number, found in enumerate(divergences, 1):
        body, more = divergence.section(found, found.metric in plotted, log_y, 1000 * number, note)
        diverged += body
        colours |= more
    firsts = [by_axis[0] for by_axis in comparisons]
    first = firsts[0]
    what = first.metric.name if one else f"{len(firsts)} metrics"
    heading = clean(title) if title else f"{what} of {max(len(c.points) for c in firsts)} models"
    no_plots = "" if plots else "<p>No result has both the metric and a place on an axis; the table lists them.</p>"
    parts = [
        ("plots", "Plots", plots + no_plots),
        ("table", "Table", _FILTER + "".join(content.tables(c) for c in firsts)),
        ("divergence", "Divergence from the reference", diverged),
        ("settings", "Settings", "".join(_named(c, one) + content.settings(c) for c in firsts)),
        ("families", "About the formats", content.families(firsts)),
        ("reproduce", "Reproduce", _REPRODUCE + content.runs(firsts)),
        ("left-out", "Left out, replaced, kept apart", content.notices(notices) if notices else ""),
    ]
    links = [(name, text) for name, text, body in parts if body]
    about = subtitle(first) if one else "  ·  ".join(c.metric.label for c in firsts)
    body = content.heading(about, heading, links) + "".join(content.verdict(c, one) for c in firsts)
    for part in parts:
        body += "".join(content.section(*part))
    return page(heading, body + _FOOTER, colours)


def _plots(comparisons: Sequence[Sequence[Comparison]], log_y: bool | None, note: Say) -> tuple[str, dict[str, str]]:
    """The pictures, and their colours; what could not be drawn is noted."""
    plots: list[str] = []
    colours: dict[str, str] = {}
    for by_axis in comparisons:
        one = len(comparisons) == 1
        for comparison in by_axis:
            for notice in comparison.notices:
                note(notice)
            drawing = arrange(comparison, log_y)
            for message in drawing.left_out:
                note(message if one else f"{comparison.metric.label}: {message}")
            if drawing.points:
                title = None if one else f"{comparison.metric.label} by {comparison.axis.short}"
                settings = PlotSettings(title=title)
                plots.append(picture(comparison, drawing, settings, len(plots) + 1, note))
                colours |= palette(drawing)
    return "".join(plots), colours


def _named(comparison: Comparison, one: bool) -> str:
    return "" if one else f"<h3>{escape(comparison.metric.label)}</h3>"


_FILTER = (
    '<div class="tools"><input id="filter" type="search" placeholder="Filter, e.g. Q4; NVFP4" aria-label="Filter rows">'
    '<span class="soft">Click a heading to sort.</span></div>'
)
_REPRODUCE = f"<p>{escape('Each command repeats one row. Paths are those of the machine that it ran on.')}</p>"
_FOOTER = (
    "<footer>Bits per weight count every stored bit of the decoder's matrices. GB are 1024³ bytes. VRAM is decoder and "
    "head weights only, as on ExLlamaV3's plots: not what a GPU must hold. Made with compare of lmeval-ext.</footer>"
)
