"""`Point`: one record on the chosen metric and axis."""

from __future__ import annotations

from dataclasses import dataclass

from compare.comparison.mean import Part
from compare.results.records import Record


@dataclass(frozen=True)
class Point:
    """A record on the chosen metric and axis. `group` 0 is the comparison; others stand apart.

    `parts` are the tasks that a mean is over, and those left out of it (`Comparison.parts` in the same order).
    `size` numbers the models of different size (`compare.comparison.model_sizes`): 0 is the most frequent, None
    unknown.
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
        """Points of equal key lie on one line: same tokens, model size, family, and arithmetic."""
        return (self.group, self.size, self.record.quantization.family, self.record.quantization.arithmetic)
