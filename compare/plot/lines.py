"""One line per model: strokes that can be told apart, and a legend beside the axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from compare.plot import style
from compare.plot.distributions import Distributions
from compare.plot.header import MARGIN, Box

LEGEND = 0.31  # of the figure's width
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))


def strokes(models: Distributions, theme: style.Theme) -> list[dict[str, Any]]:
    """How each line is drawn: in its family's colour, each further one of a family paler and with other dashes."""
    seen: dict[str, int] = defaultdict(int)
    result = []
    for point, series in models.pairs:
        rank = seen[series.name]
        seen[series.name] += 1
        paler = (rank + rank // len(_DASHES)) % len(_DASHES)
        colour = models.drawing.colour(point, series, theme.dark)
        result.append({"color": colour, "alpha": 1 - 0.13 * paler, "linestyle": _DASHES[rank % len(_DASHES)]})
    return result


def beside_legend(box: Box) -> Box:
    """The part of a picture's room for axes that the legend leaves."""
    left, bottom, width, height = box
    return left, bottom, width - LEGEND, height


def draw_legend(figure: Figure, box: Box, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Draws the legend on the right of the room for axes, `box`. names: one per handle, of one or two lines."""
    _, bottom, _, height = box
    figure.legend(
        handles=list(handles), labels=list(names), loc="upper left",
        bbox_to_anchor=(1 - MARGIN - LEGEND + 0.02, bottom + height), frameon=False, handlelength=2.6,
        fontsize=style.TICK - 1 if len(names) <= 14 else style.CAPTION - 1, borderaxespad=0, borderpad=0,
        labelspacing=0.55,
    )  # fmt: skip


def name_room(models: Distributions) -> int:
    """Characters of a name for which the legend has room."""
    return 30 if len(models.points) <= 14 else 36
