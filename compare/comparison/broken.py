"""Models with a figure that is NaN or infinite: marked in every comparison, since the others are then suspect, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from compare.comparison.point import Point
from compare.results.records import Record
from compare.text import and_more


def mark_broken(records: list[Record]) -> list[Record]:
    """The records, each with the broken figures of all runs of its model."""
    figures: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for record in records:
        figures[record.identity[1:]].update(dict.fromkeys(record.not_numbers))
    return [replace(record, not_numbers=tuple(figures[record.identity[1:]])) for record in records]


def warnings(points: Sequence[Point]) -> list[str]:
    """A line for each model with a broken figure."""
    return [
        f"warning: {point.record.label}: not a finite number: {and_more(list(point.record.not_numbers))}: the model or "
        "its engine is broken, and its other figures are not to be trusted"
        for point in points
        if point.record.not_numbers
    ]
