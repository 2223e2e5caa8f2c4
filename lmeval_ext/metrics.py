"""Turns per-window sums into perplexity, bits per byte, means, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from compare.metrics import METRICS, exp_of_mean, mean, mean_in_bits, root_of_mean

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MIN_BLOCKS = 5
_RESAMPLES = 10_000
_SEED = 20240229
_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


class WindowSum(TypedDict):
    """What one window adds to an aggregate: a float64 sum, and the count that divides it.

    window: its index. total: value summed over the scored targets (negative log-likelihood in nats, hits,
    divergences, …). count: scored targets, or UTF-8 bytes. nonfinite: targets whose log-probability was NaN or
    infinite.
    """

    window: int
    total: float
    count: int
    nonfinite: int


def perplexity(sums: Sequence[WindowSum]) -> float | None:
    """exp(Σ NLL / Σ targets); None if any log-probability was not finite, or if exp overflows."""
    nats = token_mean(sums)
    return math.exp(nats) if nats is not None and nats < _LARGEST_EXPONENT else None


def bits_per_byte(sums: Sequence[WindowSum]) -> float | None:
    """Σ NLL / ln 2 / Σ bytes, over tokens that are each scored once (Gao et al. 2020, The Pile, §3.1)."""
    nats = token_mean(sums)
    return None if nats is None else nats / math.log(2)


def token_mean(sums: Sequence[WindowSum]) -> float | None:
    """Σ total / Σ count, summed in float64: an accuracy from hits, a mean divergence from divergences.

    None if any log-probability was not finite (its rank has no meaning), or if nothing was counted.
    """
    count = sum(s["count"] for s in sums)
    if any(s["nonfinite"] for s in sums) or not count:
        return None
    return math.fsum(s["total"] for s in sums) / count


def root_mean_square(sums: Sequence[WindowSum]) -> float | None:
    """√(Σ squares / Σ targets); None if any log-probability was not finite."""
    square = token_mean(sums)
    return None if square is None else math.sqrt(square)


# The formula of the metric table that each statistic computes
_FORMULAS: dict[Any, Callable[[Floats, Floats], Floats]] = {
    token_mean: mean,
    perplexity: exp_of_mean,
    bits_per_byte: mean_in_bits,
    root_mean_square: root_of_mean,
}


def statistic_of(metric: str) -> Callable[[Sequence[WindowSum]], float | None]:
    """The statistic of window sums for a metric of the table `compare.metrics.METRICS` that is formed from sums."""
    formula = METRICS[metric].formula
    return next(statistic for statistic, own in _FORMULAS.items() if own is formula)


def formula_of(statistic: Callable[[Sequence[WindowSum]], float | None]) -> Callable[[Floats, Floats], Floats]:
    """The formula, elementwise on totals and counts, that a statistic computes."""
    return _FORMULAS.get(statistic, mean)


def standard_error(
    sums: Sequence[WindowSum],
    statistic: Callable[[Sequence[WindowSum]], float | None],
    block_windows: int,
) -> float | None:
    """Standard error of `statistic` by the block bootstrap of `bootstrap_error`, with 10,000 resamples.

    It is the error of this text as a sample of such texts. Most of it cancels between two models on the same windows:
    compare those in pairs. None if the statistic is None, below five blocks, or if a resample counts nothing.
    """
    if statistic(sums) is None:
        return None
    blocks = _block_sums(sums, block_windows)

    def resampled(draws: Integers) -> Floats | None:
        drawn = blocks[draws].sum(axis=1)  # [resamples, 2]
        if not drawn[:, 1].all():
            return None
        return formula_of(statistic)(drawn[:, 0], drawn[:, 1])

    return bootstrap_error(len(blocks), _RESAMPLES, resampled)


def bootstrap_error(blocks: int, resamples: int, statistic: Callable[[Integers], Floats | None]) -> float | None:
    """Standard error by a block bootstrap over windows, with a fixed seed; None below five blocks.

    Overlapping windows score the same tokens again, so single windows are not independent. Therefore *blocks* of
    consecutive windows (`block_of_window`) are resampled with replacement (Künsch 1989, non-overlapping blocks as in
    Carlstein 1986); windows a block apart share no token. The error is the standard deviation of the statistic over
    the resamples times √(B / (B - 1)) for B blocks; without that factor it is too small (Efron and Tibshirani 1993,
    §5.3). Fewer than five blocks say nothing about spread.

    statistic: from the blocks drawn, int64 [resamples, blocks], to the statistic of each resample, float64
    [resamples]; None if one of them has no value.
    """
    if blocks < MIN_BLOCKS:
        return None
    values = statistic(_draws(blocks, resamples))
    return None if values is None else float(_spread(values, blocks))


def bootstrap_errors(blocks: int, resamples: int, statistics: Callable[[Integers], Floats]) -> Floats | None:
    """Standard errors of several statistics from the same resamples as in `bootstrap_error`; None below five blocks.

    statistics: from how often each block was drawn, int64 [resamples, blocks], to float64 [resamples, statistics].
    Returns float64 [statistics]; NaN where a resample has no value.
    """
    if blocks < MIN_BLOCKS:
        return None
    flat = _draws(blocks, resamples) + blocks * np.arange(resamples)[:, None]
    drawn = np.bincount(flat.ravel(), minlength=resamples * blocks).reshape(resamples, blocks)
    with np.errstate(invalid="ignore"):
        return _spread(statistics(drawn), blocks)


def _draws(blocks: int, resamples: int) -> Integers:
    """The blocks that each resample draws, int64 [resamples, blocks]."""
    return np.random.default_rng(_SEED).integers(blocks, size=(resamples, blocks))


def _spread(values: Floats, blocks: int) -> Floats:
    """Standard deviation over the resamples (the first axis), corrected for the number of blocks."""
    return np.asarray(values.std(axis=0, ddof=1) * math.sqrt(blocks / (blocks - 1)))


def count_blocks(windows: int, block_windows: int) -> int:
    """Number of blocks that the bootstrap makes of so many windows, in blocks of `block_windows`."""
    return windows // block_windows


def block_of_window(windows: int, block_windows: int) -> Integers:
    """The block of each window, int64 [windows], in blocks of `block_windows` = ceil(eval_len / stride) windows.

    The last windows, if they do not fill a block, join the block before them.
    """
    last = max(count_blocks(windows, block_windows) - 1, 0)
    return np.minimum(np.arange(windows) // block_windows, last)


def _block_sums(sums: Sequence[WindowSum], block_windows: int) -> Floats:
    """Total and count of each block, [blocks, 2]."""
    ordered = sorted(sums, key=lambda s: s["window"])
    result = np.zeros((max(count_blocks(len(ordered), block_windows), 1), 2))
    rows = np.array([[s["total"], s["count"]] for s in ordered], dtype=np.float64)
    np.add.at(result, block_of_window(len(ordered), block_windows), rows)
    return result
