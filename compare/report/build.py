"""Puts a page together: the interactive plot alone, or the whole report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from compare.comparison.choice import Answer
from compare.comparison.comparison import Comparison
from compare.errors import CompareError
from compare.plot.captions import subtitle, title_of
from compare.plot.kind import PlotSettings
from compare.plot.pictures.panels import title_of_all
from compare.plot.series import Drawing, arrange
from compare.report import answers, content, divergence, domains, positions
from compare.report.page import page
from compare.report.pictures import PageFigure, interactive, palette
from compare.text import clean, show_controls

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A section of the report. name: its anchor."""

    name: str
    title: str


def plot_page(panels: Sequence[tuple[Comparison, Drawing]], settings: PlotSettings, say: Say) -> bytes:
    """The plots as a page of their own; a point shows its figures on hover, touch and focus."""
    one = len(panels) == 1
    pictures: list[PageFigure] = []
    colours: dict[str, str] = {}
    for number, (comparison, drawing) in enumerate(panels, 1):
        own = settings if one else replace(settings, title=comparison.metric.label)
        pictures.append(interactive(comparison, drawing, own, number, say))
        colours |= palette(drawing)
    title = title_of(panels[0][0], settings.title) if one else title_of_all(panels, settings.title)
    return page("plot", title, colours, settings.dark, heading="" if one else title, pictures=pictures)


def build(
    comparisons: Sequence[Sequence[Comparison]],
    divergences: Sequence[Comparison],
    answered: Sequence[Comparison],
    title: str | None,
    log_y: bool | None,
    notices: list[str],
    note: Say,
) -> bytes:
    """The report.

    comparisons: one sequence per metric, the same results on each axis that is drawn; divergences: one comparison per
    task that was measured against a reference; answered: one per task with right and wrong answers, with its pairs;
    notices: the messages so far, to which `note` adds.
    """
    one = len(comparisons) == 1
    pictures, colours = _plots(comparisons, log_y, note)
    plotted = {by_axis[0].metric for by_axis in comparisons}
    measured = []
    for number, comparison in enumerate(divergences, 1):
        section = divergence.section(comparison, comparison.metric in plotted, log_y, 1000 * number, note)
        measured.append(section)
        colours |= section.colours
    firsts = [by_axis[0] for by_axis in comparisons]
    by_position = positions.sections([*firsts, *divergences], 1000 * (len(divergences) + 1), note)
    for part in by_position:
        colours |= part.colours
    tabled = {c.metric for c in firsts if c.pairs is not None}
    changed = answers.sections(answered, tabled, 1000 * (len(divergences) + 2), note)
    for item in changed:
        colours |= item.colours
    first = firsts[0]
    subject = first.metric.name if one else f"{len(firsts)} metrics"
    by_domain = domains.section([*divergences, *firsts])
    answer = _answer(divergences[0] if divergences else first, note)
    parts = [
        *([Part("answer", "Which one to run")] if answer else []),
        Part("plots", "Plots"),
        Part("table", "Table"),
        *([Part("divergence", "Divergence from the reference")] if measured else []),
        *([Part("domains", "By domain")] if by_domain is not None else []),
        *([Part("position", "By position in the window")] if by_position else []),
        *([Part("answers", "Answers that changed")] if changed else []),
        Part("settings", "Settings"),
        Part("families", "About the formats"),
        Part("reproduce", "Reproduce"),
        *([Part("left-out", "Left out, replaced, kept apart")] if notices else []),
    ]
    return page(
        "report",
        clean(title) if title else f"{subject} of {max(len(c.points) for c in firsts)} models",
        colours,
        dark=False,
        about=subtitle(first) if one else "  ·  ".join(c.metric.label for c in firsts),
        parts=parts,
        verdicts=[verdict for c in firsts if (verdict := content.verdict(c, one)) is not None],
        answer=answer,
        pictures=pictures,
        tables=[table for c in firsts for table in content.tables(c)],
        divergences=measured,
        meaning=divergence.MEANING,
        by_domain=by_domain,
        by_position=by_position,
        position_meaning=positions.MEANING,
        answers=changed,
        answers_meaning=answers.MEANING,
        settings=[content.settings(c, "" if one else c.metric.label) for c in firsts],
        families=content.families(firsts),
        runs=content.runs(firsts),
        notices=[show_controls(line) for line in notices],
    )


def _answer(comparison: Comparison, note: Say) -> list[str]:
    """What `compare choose` says of this metric; `note` gets the reason where it can say nothing."""
    try:
        return [show_controls(sentence.text) for sentence in Answer(comparison).sentences()]
    except CompareError as error:
        note(f"no answer to which model to run: {error}")
        return []


def _plots(
    comparisons: Sequence[Sequence[Comparison]], log_y: bool | None, note: Say
) -> tuple[list[PageFigure], dict[str, str]]:
    """The pictures with their colours; `note` receives what could not be drawn."""
    one = len(comparisons) == 1
    plots: list[PageFigure] = []
    colours: dict[str, str] = {}
    for by_axis in comparisons:
        for comparison in by_axis:
            for notice in comparison.notices:
                note(notice)
            drawing = arrange(comparison, log_y)
            for message in drawing.left_out:
                note(message if one else f"{comparison.metric.label}: {message}")
            if drawing.points:
                title = None if one else f"{comparison.metric.label} by {comparison.axis.short}"
                plots.append(interactive(comparison, drawing, PlotSettings(title=title), len(plots) + 1, note))
                colours |= palette(drawing)
    return plots, colours
