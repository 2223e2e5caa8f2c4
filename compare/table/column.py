"""What a column of a table is, and how figures are written in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point


@dataclass(frozen=True)
class Column:
    """A column for readers: its heading, its text for a point, and whether a table without any such text needs it.

    number: the figure behind the text, where there is one; sorting goes by it.
    """

    heading: str
    text: Callable[[Comparison, Point], str]
    number: Callable[[Comparison, Point], float | None] | None = None
    always: bool = False

    @property
    def right(self) -> bool:
        """Whether the column is aligned to the right, as figures are."""
        return self.number is not None


def figure_text(value: float | None, digits: str) -> str:
    return "–" if value is None else format(value, digits)


def metric_text(value: float | None, stderr: float | None = None) -> str:
    """``25.0648 ± 0.87``: four decimals (four digits where they would vanish), the error to two digits."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4g}"
    return text if stderr is None else f"{text} ± {_two_digits(stderr)}"


def _two_digits(value: float) -> str:
    if value < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
