"""`Point`: one record on the chosen metric and axis."""

from __future__ import annotations

from dataclasses import dataclass

from compare.comparison.mean import Part
from compare.results.records import Record


@dataclass(frozen=True)
class Point:
    """A record on the chosen metric and axis. Group 0 is the comparison; the other groups stand apart.

    parts: the tasks of a mean, including those left out of it, in the order of `Comparison.parts`.
    size: number of the model size (`compare.comparison.model_sizes`): 0 is the most frequent, None unknown.
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
