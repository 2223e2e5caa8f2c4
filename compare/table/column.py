"""What a column of a table is, and how figures are written in it."""

from __future__ import annotations

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
