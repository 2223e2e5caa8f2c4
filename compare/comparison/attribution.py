"""Which parts cost the most, and how few of them hold half of the cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compare.results.attribution import Attribution, PartCost


@dataclass(frozen=True)
class Ranked:
    """A part by its cost: `cost` in nats beyond the original's own divergence.

    share: of the sum over all parts. density: share of the cost over share of the weights; 1 is the average. Both are
    None where a cost or a number of weights is unknown.
    """

    part: PartCost
    cost: float
    share: float | None
    density: float | None


def ranked(attribution: Attribution) -> list[Ranked]:
    """The parts with a known cost, most expensive first."""
    costs = [(part, cost) for part in attribution.parts if (cost := attribution.alone(part)) is not None]
    complete = len(costs) == len(attribution.parts)
    total = math.fsum(cost for _, cost in costs)
    sizes = [part.weights for part in attribution.parts]
    weights = sum(size for size in sizes if size) if all(sizes) else 0
    rows = []
    for part, cost in sorted(costs, key=lambda pair: -pair[1]):
        share = cost / total if complete and total > 0 else None
        density = share / (part.weights / weights) if share is not None and weights and part.weights else None
        rows.append(Ranked(part, cost, share, density))
    return rows


def summary(attribution: Attribution) -> list[str]:
    """What the costs say together, in sentences."""
    rows = ranked(attribution)
    lines = []
    if attribution.whole is not None and attribution.base is not None:
        error = "" if attribution.whole_stderr is None else f" ± {attribution.whole_stderr:.2g}"
        lines.append(
            f"All parts quantized: {attribution.whole:.4g}{error} nats; none: {attribution.base:.3g} nats, "
            "the original against its reference."
        )
    if attribution.additivity is not None:
        lines.append(f"The costs of single parts add up to {attribution.additivity:.2f} of the cost of all together.")
    unknown = len(attribution.parts) - len(rows)
    if unknown:
        lines.append(f"Unknown: the cost of {unknown} parts, whose divergence is not finite.")
    half = _half(rows)
    if half is not None:
        few, share, weights = half
        lines.append(
            f"{few} of {len(rows)} parts have {share:.0%} of the cost and {weights:.0%} of the weights: the first to "
            "keep in more bits."
        )
    return lines


def _half(rows: list[Ranked]) -> tuple[int, float, float] | None:
    """How many of the parts, by cost for their weights, hold half of the cost; with their share of cost and weights."""
    if not rows or any(row.density is None for row in rows):
        return None
    weights = sum(row.part.weights or 0 for row in rows)
    share, size = 0.0, 0
    for number, row in enumerate(sorted(rows, key=lambda row: -(row.density or 0.0)), 1):
        share, size = share + (row.share or 0.0), size + (row.part.weights or 0)
        if share >= 0.5:
            return number, share, size / weights
    return None
