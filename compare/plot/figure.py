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

from compare.errors import CompareError
from compare.plot import style

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlotSettings:
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
    draw: Callable[[Figure, PlotSettings, Say], None]


def render(picture: Picture, settings: PlotSettings, kind: str, say: Say) -> bytes:
    """The picture as the bytes of a ``png``, ``svg`` or ``pdf`` file."""
    with style_sheet(settings.theme):
        figure = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(figure)
        picture.draw(figure, settings, say)
        stream = io.BytesIO()
        metadata = file_metadata(picture.title, picture.description, kind)
        figure.savefig(stream, format=kind, dpi=style.DPI, metadata=metadata)
    return stream.getvalue()


def show(picture: Picture, settings: PlotSettings, say: Say) -> None:
    """Open a window and wait for it. CompareError where matplotlib finds no toolkit for windows."""
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    with style_sheet(settings.theme):
        try:
            figure = pyplot.figure(figsize=picture.size, dpi=style.DPI / 2)
        except Exception as error:  # each toolkit fails in its own way when the display is not there
            raise CompareError("no window could be opened; name a file: -o plot.png (or .svg, .pdf)") from error
        if pyplot.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
            raise CompareError("no toolkit for windows (PyQt, tkinter …) here; name a file: -o plot.png")
        picture.draw(figure, settings, say)
        pyplot.show()


@contextmanager
def style_sheet(theme: style.Theme) -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box, which says enough
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style.rc(theme))
        yield


def file_metadata(title: str, description: str, kind: str) -> dict[str, Any]:
    if kind == "pdf":
        return {"Title": title, "Subject": description, "Creator": "compare", "CreationDate": None, "ModDate": None}
    if kind == "svg":
        return {"Title": title, "Description": description, "Creator": "compare", "Date": None}
    return {"Title": title, "Description": description, "Software": "compare"}
