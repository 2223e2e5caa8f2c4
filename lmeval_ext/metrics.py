"""From the scores of windows to perplexity, accuracy and their errors. Sums and counts in, floats out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

MIN_BLOCKS = 5
RESAMPLES = 10_000
_LARGEST = math.log(np.finfo(np.float64).max)


class WindowSum(TypedDict):
    """What one window adds to an aggregate: a float64 sum, and the count that divides it.

    window: its index. total: summed value over the scored targets (natural-log NLL, or hits). count: scored
    targets, or UTF-8 bytes. nonfinite: targets whose log-probability was NaN or infinite.
    """

    window: int
    total: float
    count: int
    nonfinite: int


def ratio(sums: Sequence[WindowSum]) -> float:
    """Σ total / Σ count, summed in float64."""
    return math.fsum(s["total"] for s in sums) / sum(s["count"] for s in sums)


def perplexity(sums: Sequence[WindowSum]) -> float | None:
    """exp(Σ NLL / Σ targets); None where any log-probability was not finite, or exp overflows: no such number."""
    mean = _finite_ratio(sums)
    return math.exp(mean) if mean is not None and mean < _LARGEST else None


def bits_per_byte(sums: Sequence[WindowSum]) -> float | None:
    """Σ NLL / ln 2 / Σ bytes, over tokens that are each scored once (Gao et al. 2020, The Pile, §3.1)."""
    mean = _finite_ratio(sums)
    return None if mean is None else mean / math.log(2)


def accuracy(sums: Sequence[WindowSum]) -> float | None:
    """Σ hits / Σ targets; None where any log-probability was not finite, since its rank means nothing."""
    return _finite_ratio(sums)


def root_mean_square(sums: Sequence[WindowSum]) -> float | None:
    """√(Σ squares / Σ targets); None where any log-probability was not finite."""
    mean = _finite_ratio(sums)
    return None if mean is None else math.sqrt(mean)


# What a statistic makes of Σ total / Σ count, where it is not that itself
_OF_MEAN: dict[Any, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    perplexity: np.exp,
    bits_per_byte: lambda mean: mean / math.log(2),
    root_mean_square: np.sqrt,
}


def _finite_ratio(sums: Sequence[WindowSum]) -> float | None:
    if any(s["nonfinite"] for s in sums) or not sum(s["count"] for s in sums):
        return None
    return ratio(sums)


def standard_error(
    sums: Sequence[WindowSum],
    statistic: Callable[[Sequence[WindowSum]], float | None],
    block_windows: int,
) -> float | None:
    """Standard error of `statistic` by a block bootstrap over windows.

    Overlapping windows score the same tokens again, so single windows are not independent. What is
    resampled, with replacement, is *blocks* of `block_windows` = ceil(eval_len / stride) consecutive windows
    (Künsch 1989, non-overlapping blocks as in Carlstein 1986; windows that fill no block of their own join
    the last one); windows a block apart share no token. The error is the standard deviation of the statistic
    over 10,000 resamples with a fixed seed, times √(B / (B - 1)) for B blocks, without which it is too small by
    that factor (Efron and Tibshirani 1993, §5.3). None below five blocks: so few say nothing about spread.

    It is the error of this text as a sample of such texts. Between two models on the same windows most of it
    cancels: compare those in pairs.
    """
    if statistic(sums) is None:
        return None
    blocks = _blocks(sums, block_windows)
    if len(blocks) < MIN_BLOCKS:
        return None
    rng = np.random.default_rng(20240229)
    draws = rng.integers(len(blocks), size=(RESAMPLES, len(blocks)))
    drawn = blocks[draws].sum(axis=1)  # [RESAMPLES, 2]
    if not drawn[:, 1].all():  # a resample without any token of this kind
        return None
    values = drawn[:, 0] / drawn[:, 1]
    if statistic in _OF_MEAN:
        values = _OF_MEAN[statistic](values)
    return float(values.std(ddof=1) * math.sqrt(len(blocks) / (len(blocks) - 1)))


def count_blocks(windows: int, block_windows: int) -> int:
    """Blocks that `standard_error` makes of so many windows."""
    return windows // block_windows


def _blocks(sums: Sequence[WindowSum], block_windows: int) -> npt.NDArray[np.float64]:
    """[blocks, 2]: total and count of consecutive windows."""
    ordered = sorted(sums, key=lambda s: s["window"])
    table = np.array([[s["total"], s["count"]] for s in ordered], dtype=np.float64)
    blocks = count_blocks(len(ordered), block_windows)
    which = np.minimum(np.arange(len(ordered)) // block_windows, max(blocks - 1, 0))
    result = np.zeros((max(blocks, 1), 2))
    np.add.at(result, which, table)
    return result
