"""Puts the page together: the interactive plot alone, or the whole report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from compare.comparison import Comparison
from compare.plot.figure import Settings
from compare.plot.series import Drawing, arrange
from compare.plot.words import title_of
from compare.report import content
from compare.report.page import page
from compare.report.pictures import palette, picture
from compare.text import clean

Say = Callable[[str], None]


def plot_page(comparison: Comparison, drawing: Drawing, settings: Settings, say: Say) -> bytes:
    """The plot as a page of its own, with what each point says on hover, touch and focus."""
    body = picture(comparison, drawing, settings, 1, say)
    return page(title_of(comparison, settings.title), body, palette(drawing), settings.dark, bare=True)


def build(comparisons: Sequence[Comparison], title: str | None, log_y: bool, notices: list[str], note: Say) -> bytes:
    """The report of one metric; `comparisons` are the same results on each axis that is drawn.

    notices: what was said so far; `note` adds to it.
    """
    first = comparisons[0]
    plots: list[str] = []
    colours: dict[str, str] = {}
    for number, comparison in enumerate(comparisons, 1):
        for notice in comparison.notices:
            note(notice)
        drawing = arrange(comparison, log_y)
        for message in drawing.left_out:
            note(message)
        if drawing.points:
            plots.append(picture(comparison, drawing, Settings(log_y=log_y), number, note))
            colours |= palette(drawing)
    heading = clean(title) if title else f"{first.metric.name} of {len(first.points)} models"
    no_plots = "" if plots else "<p>No result has both the metric and a place on an axis; the table lists them.</p>"
    parts = [
        ("plots", "Plots", "".join(plots) + no_plots),
        ("table", "Table", _FILTER + content.tables(first)),
        ("settings", "Settings", content.settings(first)),
        ("families", "About the formats", content.families(first)),
        ("reproduce", "Reproduce", _REPRODUCE + content.runs(first)),
        ("left-out", "Left out, replaced, kept apart", content.notices(notices) if notices else ""),
    ]
    links = [(name, text) for name, text, body in parts if body]
    body = content.heading(first, heading, links) + content.verdict(first)
    for part in parts:
        body += "".join(content.section(*part))
    return page(heading, body + _FOOTER, colours)


_FILTER = (
    '<div class="tools"><input id="filter" type="search" placeholder="Filter, e.g. Q4; NVFP4" aria-label="Filter rows">'
    '<span class="soft">Click a heading to sort.</span></div>'
)
_REPRODUCE = f"<p>{escape('Each command repeats one row. Paths are those of the machine that it ran on.')}</p>"
_FOOTER = (
    "<footer>Bits per weight count every stored bit of the decoder's matrices. GB are 1024³ bytes. VRAM is decoder and "
    "head weights only, as on ExLlamaV3's plots: not what a GPU must hold. Made with compare of lmeval-ext.</footer>"
)
