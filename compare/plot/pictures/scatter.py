"""One figure per model against its size: points, lines per family, reference lines."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.plot import style
from compare.plot.axes import draw_data
from compare.plot.captions import alternative_text, texts, title_of
from compare.plot.figure import Picture, PlotSettings, Say, file_metadata, style_sheet
from compare.plot.header import draw_texts, make_room_for_ticks, marker_size
from compare.plot.labels import draw_labels
from compare.plot.pictures import panels as multiples
from compare.plot.series import Drawing


def picture_of(panels: multiples.Panels, settings: PlotSettings) -> Picture:
    """A panel a metric, or the one plot. Raises CompareError for more panels than can be read."""
    if len(panels) == 1:
        comparison, drawing = panels[0]
        return Picture(
            (style.WIDTH, style.HEIGHT),
            title_of(comparison, settings.title),
            alternative_text(comparison, drawing),
            lambda figure, settings, say: _draw(figure, comparison, drawing, settings, say),
        )

    def draw(figure: Figure, settings: PlotSettings, say: Say) -> None:
        _say_unlabelled(multiples.draw(figure, panels, settings.title, settings.theme), say)

    width, height = multiples.new_figure(panels).get_size_inches()
    description = " ".join(f"{c.metric.label}: {alternative_text(c, d)}" for c, d in panels)
    return Picture((width, height), multiples.title_of_all(panels, settings.title), description, draw)


@dataclass(frozen=True)
class Spot:
    """Where a point lies, in fractions of the picture from its upper left corner; `radius` of its marker likewise, of
    the picture's width. A reference line has the ends of its line instead: `x` and `x_end`."""

    point: Point
    x: float
    y: float
    radius: float
    x_end: float | None = None


def render_svg(comparison: Comparison, drawing: Drawing, settings: PlotSettings, say: Say) -> tuple[bytes, list[Spot]]:
    """The picture as SVG, and where its points are."""
    with style_sheet(settings.theme):
        figure = Figure(figsize=(style.WIDTH, style.HEIGHT), dpi=style.DPI)
        FigureCanvasAgg(figure)
        _draw(figure, comparison, drawing, settings, say)
        spots = _spots(figure, drawing)
        stream = io.BytesIO()
        metadata = file_metadata(title_of(comparison, settings.title), alternative_text(comparison, drawing), "svg")
        figure.savefig(stream, format="svg", dpi=style.DPI, metadata=metadata)
    return stream.getvalue(), spots


def _spots(figure: Figure, drawing: Drawing) -> list[Spot]:
    ax: Any = figure.axes[0]
    width, height = figure.bbox.size
    radius = marker_size("o", len(drawing.points)) / 2 / 72 / style.WIDTH
    spots = []
    for point in drawing.points:
        x, y = ax.transData.transform((point.x, point.y))
        spots.append(Spot(point, x / width, 1 - y / height, radius))
    extent = ax.get_window_extent()
    for point in drawing.references:
        y = ax.transData.transform((ax.get_xlim()[0], point.y))[1]
        spots.append(Spot(point, extent.x0 / width, 1 - y / height, radius, extent.x1 / width))
    return spots


def _draw(figure: Figure, comparison: Comparison, drawing: Drawing, settings: PlotSettings, say: Say) -> None:
    layout = draw_texts(figure, texts(comparison, drawing, settings.title), [drawing], settings.theme)
    ax = figure.add_axes(layout.axes_box)
    draw_data(ax, comparison, drawing, settings.theme)
    make_room_for_ticks(figure, ax, layout.axes_box)
    unlabelled = draw_labels(ax, comparison, drawing, settings.theme, layout.legend_shown)
    _say_unlabelled(unlabelled, say)


def _say_unlabelled(unlabelled: int, say: Say) -> None:
    if unlabelled:
        say(f"{unlabelled} points are drawn without a label, there is no room for more; --mask narrows the choice")
