"""Colours and text sizes of the pictures, light and dark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """The colours that are not a family's."""

    ground: str
    ink: str
    soft: str
    grid: str
    dark: bool


LIGHT = Theme(ground="#ffffff", ink="#1a1d21", soft="#5c6470", grid="#e8eaee", dark=False)
DARK = Theme(ground="#14171c", ink="#eef1f5", soft="#a3acb8", grid="#282d35", dark=True)

WIDTH, HEIGHT, DPI = 10.0, 6.4, 200

# Text sizes in points at 10 inches of width: legible when the picture is shown half as large.
TITLE, SUBTITLE, AXIS, TICK, LABEL, CAPTION = 17.0, 11.0, 11.5, 10.5, 9.5, 8.5


def rc(theme: Theme) -> dict[str, Any]:
    """matplotlib settings: the font it ships (the same picture everywhere), nothing of the user's own style."""
    return {
        "font.family": ["DejaVu Sans"],
        "text.usetex": False,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "svg.hashsalt": "compare",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.soft,
        "axes.linewidth": 0.8,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
    }
