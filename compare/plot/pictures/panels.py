"""Several metrics in one picture: a panel per metric, one legend, one caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from compare.comparison.comparison import Comparison
from compare.errors import CompareError
from compare.plot import style
from compare.plot.axes import draw_data
from compare.plot.captions import Texts, alternative_text, caption, settings_of, title_of
from compare.plot.header import Box, draw_texts, make_room_for_ticks
from compare.plot.kind import PlotKind, PlotSettings, Say
from compare.plot.labels import draw_labels, say_unlabelled
from compare.plot.series import Drawing

MAX_PANELS = 12
# Inches; around: title and legend; line: of the caption.
_PANEL_WIDTH, _PANEL_HEIGHT, _AROUND, _LINE = 6.0, 4.2, 1.65, 0.2
_HEADING, _FOOT, _GAP = 0.62, 0.62, 0.35  # inches of a panel above and below its axes, and between panels
_MAX_LABELS = 30

Panels = Sequence[tuple[Comparison, Drawing]]


def columns_of(count: int) -> int:
    """The number of panels in a row."""
    return count if count <= 3 else 2 if count == 4 else 3


class PanelGrid(PlotKind):
    """A panel per metric. Raises CompareError for more panels than can be read."""

    def __init__(self, panels: Panels, settings: PlotSettings) -> None:
        if len(panels) > MAX_PANELS:
            raise CompareError(
                f"{len(panels)} metrics are more than one picture can show ({MAX_PANELS}); "
                "name fewer, or draw their --mean"
            )
        columns = columns_of(len(panels))
        rows = math.ceil(len(panels) / columns)
        height = _AROUND + rows * _PANEL_HEIGHT + _LINE * len(_captions(panels))
        self.panels = panels
        self.size = (columns * _PANEL_WIDTH, height)
        self.title = title_of_all(panels, settings.title)
        self.description = " ".join(f"{c.metric.label}: {alternative_text(c, d)}" for c, d in panels)

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        panels, theme = self.panels, settings.theme
        models = len({p.record.identity[1:] for _, drawing in panels for p in drawing.points + drawing.references})
        texts = Texts(title_of_all(panels, settings.title), f"{models} models", _captions(panels))
        layout = draw_texts(figure, texts, [drawing for _, drawing in panels], theme)
        unlabelled = 0
        for box, (comparison, drawing) in zip(_boxes(figure, layout.axes_box, len(panels)), panels, strict=True):
            ax = figure.add_axes(_inner(figure, box))
            draw_data(ax, comparison, drawing, theme)
            _shorten(ax)
            make_room_for_ticks(figure, ax, _inner(figure, box))
            _heading(figure, box, comparison, theme)
            unlabelled += draw_labels(ax, comparison, drawing, theme, layout.legend_shown, _MAX_LABELS)
        say_unlabelled(unlabelled, say)


def title_of_all(panels: Panels, title: str | None) -> str:
    names = {comparison.metric.name for comparison, _ in panels}
    first = panels[0][0]
    if title or len(names) == 1:
        return title_of(first, title)
    return f"{len(panels)} metrics by {first.axis.short}"


def _captions(panels: Panels) -> list[str]:
    """What the marks mean, each statement once, and the best model of each metric within a budget."""
    lines = dict.fromkeys(line for panel in panels for line in caption(*panel, alone=False))
    verdicts = [
        f"{comparison.metric.label}: {comparison.verdict.headline(comparison.metric)}."
        for comparison, _ in panels
        if comparison.verdict is not None
    ]
    return [*lines, *verdicts]


def _boxes(figure: Figure, area: Box, count: int) -> list[Box]:
    """The boxes of panels in rows from the upper left corner."""
    left, bottom, width, height = area
    columns = columns_of(count)
    rows = math.ceil(count / columns)
    gap = _GAP / figure.get_figwidth()
    wide = (width - gap * (columns - 1)) / columns
    bottom -= 0.5 / figure.get_figheight()  # `draw_texts` left room for the tick labels of one plot
    high = (height + 0.5 / figure.get_figheight()) / rows
    return [
        (left + (i % columns) * (wide + gap), bottom + (rows - 1 - i // columns) * high, wide, high)
        for i in range(count)
    ]


def _inner(figure: Figure, box: Box) -> Box:
    """The box of a panel's axes with their tick labels."""
    inch = 1 / figure.get_figheight()
    left, bottom, width, height = box
    return left, bottom + _FOOT * inch, width, height - (_HEADING + _FOOT) * inch


def _shorten(ax: Any) -> None:
    """Makes the metric's name smaller until it is no longer than its axis."""
    name = ax.yaxis.label
    while name.get_window_extent().height > ax.get_window_extent().height and name.get_fontsize() > style.CAPTION - 1:
        name.set_fontsize(name.get_fontsize() - 0.5)


def _heading(figure: Figure, box: Box, comparison: Comparison, theme: style.Theme) -> None:
    """Draws the metric's name and what it was measured on."""
    left, bottom, width, height = box
    inch, top = 1 / figure.get_figheight(), bottom + height
    room = width * figure.bbox.width
    about = "  ·  ".join(filter(None, (comparison.protocol.text, *settings_of(comparison.protocol))))
    for text, size, drop, colour, weight in (
        (comparison.metric.label, style.SUBTITLE + 1, 0.05, theme.ink, "bold"),
        (about, style.CAPTION + 0.5, 0.28, theme.soft, "normal"),
    ):
        artist: Any = figure.text(
            left, top - drop * inch, text, fontsize=size, color=colour, weight=weight, va="top", ha="left"
        )
        while artist.get_window_extent().width > room and len(text) > 8:
            text = text[:-2].rstrip("… ") + "…"
            artist.set_text(text)
