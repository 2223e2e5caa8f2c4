"""Renders a picture: `render` returns the bytes of a file, `show` opens a window.

The same input gives the same bytes: no dates, a fixed hash salt, the font that matplotlib ships.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compare.errors import CompareError
from compare.plot import style
from compare.plot.kind import PlotKind, PlotSettings, Say


def render(picture: PlotKind, settings: PlotSettings, kind: str, say: Say) -> bytes:
    """Returns the picture as a ``png``, ``svg`` or ``pdf`` file."""
    with style_sheet(settings.theme):
        figure = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(figure)
        picture.draw(figure, settings, say)
        stream = io.BytesIO()
        metadata = file_metadata(picture.title, picture.description, kind)
        figure.savefig(stream, format=kind, dpi=style.DPI, metadata=metadata)
    return stream.getvalue()


def show(picture: PlotKind, settings: PlotSettings, say: Say) -> None:
    """Opens a window and waits until it is closed. Raises CompareError where matplotlib finds no window toolkit."""
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
    """Matplotlib's defaults with `theme`, whatever the user's own style file says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as an empty box, which is visible enough
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style.rc(theme))
        yield


def file_metadata(title: str, description: str, kind: str) -> dict[str, Any]:
    """The metadata of a ``png``, ``svg`` or ``pdf`` file, without a date."""
    if kind == "pdf":
        return {"Title": title, "Subject": description, "Creator": "compare", "CreationDate": None, "ModDate": None}
    if kind == "svg":
        return {"Title": title, "Description": description, "Creator": "compare", "Date": None}
    return {"Title": title, "Description": description, "Software": "compare"}
