"""One metric of each model against its size: points, a line per family, reference lines."""

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
from compare.plot.figure import file_metadata, style_sheet
from compare.plot.header import draw_texts, make_room_for_ticks, marker_size
from compare.plot.kind import PlotKind, PlotSettings, Say
from compare.plot.labels import draw_labels, say_unlabelled
from compare.plot.pictures.panels import PanelGrid, Panels
from compare.plot.series import Drawing


class Scatter(PlotKind):
    """One metric against size."""

    def __init__(self, comparison: Comparison, drawing: Drawing, settings: PlotSettings) -> None:
        self.comparison, self.drawing = comparison, drawing
        self.title = title_of(comparison, settings.title)
        self.description = alternative_text(comparison, drawing)

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        layout = draw_texts(
            figure, texts(self.comparison, self.drawing, settings.title), [self.drawing], settings.theme
        )
        ax = figure.add_axes(layout.axes_box)
        draw_data(ax, self.comparison, self.drawing, settings.theme)
        make_room_for_ticks(figure, ax, layout.axes_box)
        unlabelled = draw_labels(ax, self.comparison, self.drawing, settings.theme, layout.legend_shown)
        say_unlabelled(unlabelled, say)


def picture_of(panels: Panels, settings: PlotSettings) -> PlotKind:
    """A scatter plot of one metric, or a panel per metric. Raises CompareError for more panels than can be read."""
    return Scatter(*panels[0], settings) if len(panels) == 1 else PanelGrid(panels, settings)


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
    """Returns a scatter plot as SVG, and where its points are."""
    with style_sheet(settings.theme):
        figure = Figure(figsize=(style.WIDTH, style.HEIGHT), dpi=style.DPI)
        FigureCanvasAgg(figure)
        picture = Scatter(comparison, drawing, settings)
        picture.draw(figure, settings, say)
        spots = _spots(figure, drawing)
        stream = io.BytesIO()
        metadata = file_metadata(picture.title, picture.description, "svg")
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
