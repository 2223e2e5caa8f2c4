"""How figures depend on the position in the window: means in bins of the position, and the slope per doubling.

The *position* of a token is the number of tokens that the model was given before it, so 1 for a window's second token.
Bins double in width: 1 to 15, 16 to 31, 32 to 63, … The slope is that of the least-squares line of the tokens' values
over log2(position), each token counting alike; no bins enter it. Needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmeval_ext import metrics
from lmeval_ext.metrics import Floats, Integers, WindowSum

_FIRST_EDGE = 16  # earlier positions share a bin: each has one token per window
_EDGES = np.array([1, *(_FIRST_EDGE << i for i in range(24))], dtype=np.int64)  # to 2²⁷ tokens
_BINS = len(_EDGES) - 1
_RESAMPLES = 10_000
_MOST_BLOCKS = 32  # of which the sums are recorded

# Of the metrics of a window's tokens, those whose figures by position are recorded
BY_POSITION = ("token_perplexity", "kld", "top1_agreement", "ppl_ratio")


@dataclass(frozen=True, eq=False)
class WindowCurve:
    """One window's sums by position, from which figures over all windows are formed.

    first, last: positions of the first and the last scored token. tokens: int64 [bins]. x: float64 [2], Σ x and Σ x² of
    x = log2(position). totals: per metric, Σ value in each bin, float64 [bins]. products: per metric, Σ x · value.
    nonfinite: per metric, how many values of each bin are NaN or infinite, int64 [bins]; they are in no sum.
    """

    window: int
    first: int
    last: int
    tokens: Integers
    x: Floats
    totals: dict[str, Floats]
    products: dict[str, float]
    nonfinite: dict[str, Integers]

    @classmethod
    def of(cls, window: int, first: int, values: Mapping[str, Floats]) -> WindowCurve:
        """Sums of the values per scored token, float64 [tokens] by metric; the first token's position is `first`."""
        positions: Integers = first + np.arange(len(next(iter(values.values()))), dtype=np.int64)
        bins = np.searchsorted(_EDGES, positions, side="right") - 1
        x = np.log2(positions.astype(np.float64))
        totals: dict[str, Floats] = {}
        products: dict[str, float] = {}
        nonfinite: dict[str, Integers] = {}
        for metric, column in values.items():
            finite = np.isfinite(column)
            kept = np.where(finite, column, 0.0)
            totals[metric] = np.asarray(np.bincount(bins, weights=kept, minlength=_BINS), dtype=np.float64)
            products[metric] = float((x * kept).sum())
            nonfinite[metric] = np.bincount(bins[~finite], minlength=_BINS).astype(np.int64)
        tokens = np.bincount(bins, minlength=_BINS).astype(np.int64)
        last, moments = int(positions[-1]), np.array([x.sum(), (x**2).sum()])
        return cls(window, first, last, tokens, moments, totals, products, nonfinite)


class PositionedSum(dict[str, Any]):
    """A `WindowSum` with the window's curve, which --log_samples does not write: it has the values themselves."""

    def __init__(self, window_sum: WindowSum, curve: WindowCurve) -> None:
        super().__init__(window_sum)
        self.curve = curve

    def __reduce__(self) -> Any:  # ranks exchange it
        return PositionedSum, (dict(self), self.curve)


def describe(curves: Sequence[WindowCurve], block_windows: int) -> dict[str, Any]:
    """`by_position` in the task's metadata.

    edges: bin i holds the positions from edges[i] to edges[i + 1] - 1; the outer ones are those of the first and the
    last token. tokens: in each bin. blocks: of the bootstrap, consecutive ones joined until at most 32 are left.
    block_tokens: [blocks][bins]. block_x: [blocks][2], Σ x and Σ x² of x = log2(position). metrics: by name, `values`
    and `stderr` of each bin in the metric's own unit, `slope` and `slope_stderr` in the unit of its mean (nats for a
    perplexity and its ratio) per doubling of the position. A value is None where a token's is not finite; an error also
    below five blocks, and where a resample may have no token at all. `block_totals` [blocks][bins] and `block_products`
    [blocks] are Σ value and Σ x · value, from which two models on the same windows are compared in pairs; None with a
    value that is not finite.
    """
    ordered = sorted(curves, key=lambda c: c.window)
    tokens = np.array([c.tokens for c in ordered])  # [windows, bins]
    present = np.flatnonzero(tokens.sum(axis=0))
    bins = slice(int(present[0]), int(present[-1]) + 1)
    edges = _EDGES[bins.start : bins.stop + 1].tolist()
    edges[0], edges[-1] = min(c.first for c in ordered), max(c.last for c in ordered) + 1
    blocks = metrics.count_blocks(len(ordered), block_windows)
    block = metrics.block_of_window(len(ordered), block_windows)
    if blocks > _MOST_BLOCKS:
        blocks, block = _MOST_BLOCKS, block * _MOST_BLOCKS // blocks
    return {
        "edges": edges,
        "tokens": tokens.sum(axis=0)[bins].tolist(),
        "blocks": blocks,
        "block_tokens": _by_block(tokens[:, bins], block).astype(np.int64).tolist(),
        "block_x": _by_block(np.array([c.x for c in ordered]), block).tolist(),
        "metrics": {metric: _figures(metric, ordered, bins, block, blocks) for metric in ordered[0].totals},
    }


def _figures(metric: str, curves: Sequence[WindowCurve], bins: slice, block: Integers, blocks: int) -> dict[str, Any]:
    statistic = metrics.statistic_of(metric)
    sums = [
        [
            WindowSum(
                window=c.window, total=float(c.totals[metric][i]), count=int(c.tokens[i]),
                nonfinite=int(c.nonfinite[metric][i]),
            )
            for c in curves
        ]
        for i in range(bins.start, bins.stop)
    ]  # fmt: skip
    values = [statistic(of_bin) for of_bin in sums]
    totals, counts = (
        _by_block(np.array([[s[name] for s in of_bin] for of_bin in sums], dtype=np.float64).T, block)
        for name in ("total", "count")
    )
    moments = np.array([[c.tokens.sum(), *c.x, c.totals[metric].sum(), c.products[metric]] for c in curves])
    sound = not any(c.nonfinite[metric].any() for c in curves)
    by_block = _by_block(moments, block)
    slope = _slopes(by_block.sum(axis=0)[None])[0] if sound else math.nan

    def bin_errors(drawn: Integers) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return metrics.formula_of(statistic)(drawn @ totals, drawn @ counts)

    errors = metrics.bootstrap_errors(blocks, _RESAMPLES, bin_errors)
    slope_error = metrics.bootstrap_errors(blocks, _RESAMPLES, lambda drawn: _slopes(drawn @ by_block)[:, None])
    return {
        "values": values,
        "stderr": [None if value is None or errors is None else _finite(errors[i]) for i, value in enumerate(values)],
        "block_totals": totals.tolist() if sound else None,
        "block_products": by_block[:, 4].tolist() if sound else None,
        "slope": _finite(slope),
        "slope_stderr": None if slope_error is None or not math.isfinite(slope) else _finite(slope_error[0]),
    }


def _by_block(rows: Floats, block: Integers) -> Floats:
    """Sums over the windows of each block: [windows, columns] to [blocks, columns]."""
    result = np.zeros((int(block[-1]) + 1, rows.shape[1]))
    np.add.at(result, block, rows)
    return result


def _slopes(moments: Floats) -> Floats:
    """Slopes of least-squares lines from n, Σ x, Σ x², Σ y, Σ xy in the columns; NaN where all x are equal."""
    n, x, xx, y, xy = moments.T
    spread = n * xx - x * x
    level = np.where(spread > 1e-9 * n * xx, spread, np.nan)
    return (n * xy - x * y) / level


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
