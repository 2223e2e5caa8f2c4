"""Everything around the axes: title, subtitle and legend above, caption below, and the room left for the axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from compare.families import family_order
from compare.plot import style
from compare.plot.captions import Texts
from compare.plot.series import Drawing, Series
from compare.text import shorten

MARGIN = 0.028  # of the figure's width
Box = tuple[float, float, float, float]  # left, bottom, width, height, in fractions of the figure
MARKER_SIZES = {"*": 13.0, "P": 10.5, "X": 9.5, "o": 8.5, "^": 9.5, "D": 7.5, "s": 7.8}


def marker_size(marker: str, count: int = 1) -> float:
    """Points across, so that markers of different shape look equally large; smaller in a crowd of `count`."""
    return MARKER_SIZES.get(marker, 9.0) * max(0.35, min(1.0, (80 / max(count, 1)) ** 0.5))


@dataclass
class Layout:
    """Where the axes lie, in fractions of the figure: left, bottom, width, height."""

    axes_box: Box
    legend_shown: bool


def make_room_for_ticks(figure: Figure, ax: Any, box: Box) -> None:
    """Puts `ax` into `box` so that the widest tick label fits into it as well."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = ax.get_window_extent(renderer).x0 - ax.yaxis.get_tightbbox(renderer).x0
    left, bottom, width, height = box
    needed = taken / figure.bbox.width
    ax.set_position((left + needed, bottom, width - needed, height))


def draw_texts(figure: Figure, texts: Texts, drawings: Sequence[Drawing], theme: style.Theme) -> Layout:
    """Draws title, subtitle, legend and caption from the edges inwards; returns the room left for the axes."""
    inch = 1 / figure.get_figheight()
    top = 1 - 0.22 * inch
    top -= _line(figure, top, texts.title, style.TITLE, theme.ink, weight="bold") + 0.07 * inch
    top -= _line(figure, top, texts.subtitle, style.SUBTITLE, theme.soft) + 0.10 * inch
    legend = _legend(figure, top, drawings, theme)
    if legend is not None:
        top = figure.transFigure.inverted().transform(legend.get_window_extent())[0][1]
    bottom = 0.16 * inch
    for text in reversed(texts.caption):
        bottom += _line(figure, bottom, text, style.CAPTION, theme.soft, va="bottom") + 0.045 * inch
    bottom += 0.66 * inch
    top -= 0.14 * inch
    return Layout((MARGIN, bottom, 1 - 2 * MARGIN, max(top - bottom, 0.2)), legend is not None)


def _line(figure: Figure, y: float, text: str, size: float, colour: str, va: str = "top", **more: Any) -> float:
    """Draws one line of text across the figure, made smaller and then cut until it fits; returns its height."""
    artist = figure.text(MARGIN, y, text, fontsize=size, color=colour, va=va, ha="left", **more)
    room = (1 - 2 * MARGIN) * figure.bbox.width

    def width() -> float:
        return float(artist.get_window_extent().width)

    smaller = size
    while width() > room and smaller > size * 0.72:
        smaller -= 0.5
        artist.set_fontsize(smaller)
    while width() > room and len(text) > 8:
        text = text[: max(7, min(len(text) - 2, int(len(text) * room / width()) - 1))].rstrip() + "…"
        artist.set_text(text)
    return float(size * 1.25 / 72 / figure.get_figheight())


def _legend(figure: Figure, top: float, drawings: Sequence[Drawing], theme: style.Theme) -> Any:
    """Draws the families under the subtitle; None for a single family, which needs no legend."""
    families: dict[str, tuple[Drawing, Series]] = {}
    drawn = [(drawing, series) for drawing in drawings for series in drawing.series]
    for drawing, series in sorted(drawn, key=lambda pair: family_order(pair[1].name)):
        shown = families.setdefault(series.name, (drawing, series))[1]
        if not shown.joined and series.joined:
            families[series.name] = (drawing, series)
    if len(families) < 2:
        return None
    entries = [(_handle(series, drawing, theme), shorten(name, 24)) for name, (drawing, series) in families.items()]
    columns = len(entries)
    while True:
        in_rows = [entry for column in range(columns) for entry in entries[column::columns]]
        legend = figure.legend(
            handles=[handle for handle, _ in in_rows],
            labels=[name for _, name in in_rows],
            loc="upper left",
            bbox_to_anchor=(MARGIN, top),
            ncols=columns,
            frameon=False,
            fontsize=style.TICK,
            handlelength=1.9,
            handletextpad=0.5,
            columnspacing=1.5,
            borderaxespad=0,
            borderpad=0,
        )
        if columns == 1 or legend.get_window_extent().x1 < (1 - MARGIN) * figure.bbox.width:
            return legend
        legend.remove()
        columns -= 1


def _handle(series: Series, drawing: Drawing, theme: style.Theme) -> Line2D:
    points = series.points
    tagged = {drawing.colour(point, series, theme.dark) for point in points if id(point) not in drawing.dominated}
    colour = tagged.pop() if len(tagged) == 1 else series.style.dark if theme.dark else series.style.light
    return Line2D(
        [],
        [],
        color=colour,
        linewidth=2.2,
        linestyle="-" if series.joined else "none",
        marker=series.style.marker,
        markersize=marker_size(series.style.marker),
        markeredgecolor=theme.ground,
        markeredgewidth=0.8,
    )
