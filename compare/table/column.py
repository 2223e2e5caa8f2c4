"""`Column`: a column of the tables for readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point


@dataclass(frozen=True)
class Column:
    """A heading, and the text for each point.

    number: the figure behind the text, by which a report sorts; None for columns of text.
    always: keep the column even if no point has a text.
    """

    heading: str
    text: Callable[[Comparison, Point], str]
    number: Callable[[Comparison, Point], float | None] | None = None
    always: bool = False

    @property
    def right(self) -> bool:
        """Whether the column is aligned to the right, as figures are."""
        return self.number is not None
