"""Pairs in every comparison of a command, as --versus and --margin ask."""

from __future__ import annotations

from collections.abc import Sequence

from compare.comparison.comparison import Comparison
from compare.comparison.margins import MarginOption, check_used
from compare.comparison.pairs import check_formed, measure_pairs


def add_pairs(comparisons: Sequence[Comparison], label: str, margins: Sequence[MarginOption]) -> list[str]:
    """Pairs every model with the baseline `label`; returns a line for each model without a pair.

    Raises CompareError if no pair can be formed, and for a margin that none of the metrics can have.
    """
    check_used(margins, [comparison.metric for comparison in comparisons])
    measured = []
    for comparison in comparisons:
        comparison.pairs = measure_pairs(comparison.points, comparison.metric, label, margins)
        measured.append(comparison.pairs)
    check_formed(label, measured)
    lines = []
    for comparison, pairs in zip(comparisons, measured, strict=True):
        prefix = f"{comparison.metric.label}: " if len(comparisons) > 1 else ""
        for point in comparison.points:
            if pairs.pair(point).reason:
                lines.append(f"{prefix}no pair: {point.record.label}: {pairs.pair(point).reason}")
        if margins and pairs.margin is None:
            lines.append(f"note: {comparison.metric.label}: no --margin is for it, so equivalence is not tested")
    return lines
