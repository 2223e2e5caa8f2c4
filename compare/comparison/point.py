"""`Point`: one record on the chosen metric and axis; what must be said beside points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from compare.comparison.mean import Part
from compare.families import FULL_PRECISION
from compare.results.records import Record
from compare.text import and_more


@dataclass(frozen=True)
class Point:
    """A record on the chosen metric and axis. Group 0 is the comparison; the other groups stand apart.

    parts: the tasks of a mean, including those left out of it, in the order of `Comparison.parts`.
    size: number of the model, by size and architecture (`model_sizes`): 0 is the most frequent, None unknown.
    """

    record: Record
    x: float | None
    y: float | None
    stderr: float | None
    group: int = 0
    size: int | None = 0
    parts: tuple[Part, ...] = ()

    @property
    def comparable(self) -> bool:
        return self.group == 0

    @property
    def join_key(self) -> tuple[object, ...]:
        """Points with equal keys lie on one line: same tokens, model size, family, and arithmetic."""
        return (self.group, self.size, self.record.quantization.family, self.record.quantization.arithmetic)


def caveats(points: Iterable[Point]) -> Iterator[str]:
    """A line for each thing that result files do not say, or that the user said in their place, with the models."""
    labels: dict[str, list[str]] = {}
    for point in points:
        for caveat in point.record.quantization.caveats:
            labels.setdefault(caveat, []).append(point.record.label)
    for caveat, names in labels.items():
        yield f"{and_more(names)}: {caveat}"


def stated_by(baseline: Point) -> str:
    """`` (as --baseline says)`` for a baseline whose file does not say that it is in full precision."""
    record = baseline.record
    stated = record.baseline_by and record.quantization.family != FULL_PRECISION
    return f" (as {record.baseline_by} says)" if stated else ""
