"""The picture itself. `render` gives the bytes of a file, `show` opens a window.

The same input gives the same bytes: no dates, a fixed hash salt, the font that matplotlib ships.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compare.comparison import Comparison, Point
from compare.errors import CompareError
from compare.plot import multiples, style
from compare.plot.axes import draw_data
from compare.plot.header import draw_texts, make_room_for_ticks, marker_size
from compare.plot.labelling import draw_labels
from compare.plot.series import Drawing
from compare.plot.words import alternative_text, texts, title_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How the picture should look."""

    title: str | None = None
    dark: bool = False

    @property
    def theme(self) -> style.Theme:
        return style.DARK if self.dark else style.LIGHT


@dataclass(frozen=True)
class Picture:
    """Something to draw: its size in inches, its words for the file, and how."""

    size: tuple[float, float]
    title: str
    description: str
    draw: Callable[[Figure, Settings, Say], None]


def picture_of(panels: multiples.Panels, settings: Settings) -> Picture:
    """A panel a metric, or the one plot. Raises CompareError for more panels than can be read."""
    if len(panels) == 1:
        comparison, drawing = panels[0]
        return Picture(
            (style.WIDTH, style.HEIGHT),
            title_of(comparison, settings.title),
            alternative_text(comparison, drawing),
            lambda figure, settings, say: _draw(figure, comparison, drawing, settings, say),
        )

    def draw(figure: Figure, settings: Settings, say: Say) -> None:
        _say_unlabelled(multiples.draw(figure, panels, settings.title, settings.theme), say)

    width, height = multiples.new_figure(panels).get_size_inches()
    description = " ".join(f"{c.metric.label}: {alternative_text(c, d)}" for c, d in panels)
    return Picture((width, height), multiples.title_of_all(panels, settings.title), description, draw)


def render(picture: Picture, settings: Settings, kind: str, say: Say) -> bytes:
    """The picture as the bytes of a ``png``, ``svg`` or ``pdf`` file."""
    with _style(settings.theme):
        figure = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(figure)
        picture.draw(figure, settings, say)
        stream = io.BytesIO()
        metadata = _metadata(picture.title, picture.description, kind)
        figure.savefig(stream, format=kind, dpi=style.DPI, metadata=metadata)
    return stream.getvalue()


@dataclass(frozen=True)
class Spot:
    """Where a point lies, in fractions of the picture from its upper left corner; `radius` of its marker likewise, of
    the picture's width. A reference line has the ends of its line instead: `x` and `x_end`."""

    point: Point
    x: float
    y: float
    radius: float
    x_end: float | None = None


def render_svg(comparison: Comparison, drawing: Drawing, settings: Settings, say: Say) -> tuple[bytes, list[Spot]]:
    """The picture as SVG, and where its points are."""
    with _style(settings.theme):
        figure = Figure(figsize=(style.WIDTH, style.HEIGHT), dpi=style.DPI)
        FigureCanvasAgg(figure)
        _draw(figure, comparison, drawing, settings, say)
        spots = _spots(figure, drawing)
        stream = io.BytesIO()
        metadata = _metadata(title_of(comparison, settings.title), alternative_text(comparison, drawing), "svg")
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


def show(picture: Picture, settings: Settings, say: Say) -> None:
    """Open a window and wait for it. CompareError where matplotlib finds no toolkit for windows."""
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    with _style(settings.theme):
        try:
            figure = pyplot.figure(figsize=picture.size, dpi=style.DPI / 2)
        except Exception as error:  # each toolkit fails in its own way when the display is not there
            raise CompareError("no window could be opened; name a file: -o plot.png (or .svg, .pdf)") from error
        if pyplot.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
            raise CompareError("no toolkit for windows (PyQt, tkinter …) here; name a file: -o plot.png")
        picture.draw(figure, settings, say)
        pyplot.show()


def _draw(figure: Figure, comparison: Comparison, drawing: Drawing, settings: Settings, say: Say) -> None:
    layout = draw_texts(figure, texts(comparison, drawing, settings.title), [drawing], settings.theme)
    ax = figure.add_axes(layout.axes_box)
    draw_data(ax, comparison, drawing, settings.theme)
    make_room_for_ticks(figure, ax, layout.axes_box)
    unlabelled = draw_labels(ax, comparison, drawing, settings.theme, layout.legend_shown)
    _say_unlabelled(unlabelled, say)


def _say_unlabelled(unlabelled: int, say: Say) -> None:
    if unlabelled:
        say(f"{unlabelled} points are drawn without a label, there is no room for more; --mask narrows the choice")


@contextmanager
def _style(theme: style.Theme) -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box, which says enough
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style.rc(theme))
        yield


def _metadata(title: str, description: str, kind: str) -> dict[str, Any]:
    if kind == "pdf":
        return {"Title": title, "Subject": description, "Creator": "compare", "CreationDate": None, "ModDate": None}
    if kind == "svg":
        return {"Title": title, "Description": description, "Creator": "compare", "Date": None}
    return {"Title": title, "Description": description, "Software": "compare"}
