"""Aggregates and their errors, compared with values worked out by hand and with scipy's bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lmeval_ext import metrics
from lmeval_ext.metrics import WindowSum


def sums(totals: list[float], counts: list[int], nonfinite: int = 0) -> list[WindowSum]:
    return [
        {"window": i, "total": t, "count": c, "nonfinite": nonfinite if i == 0 else 0}
        for i, (t, c) in enumerate(zip(totals, counts, strict=True))
    ]


def test_perplexity_weights_tokens_equally_not_windows() -> None:
    # NLL 3 over 1 token and 9 over 3: exp(12 / 4)
    assert metrics.perplexity(sums([3, 9], [1, 3])) == pytest.approx(math.exp(3))


def test_bits_per_byte_equals_value_by_hand() -> None:
    assert metrics.bits_per_byte(sums([math.log(2) * 6], [4])) == pytest.approx(1.5)


def test_nonfinite_logprobs_give_none() -> None:
    for function in (metrics.perplexity, metrics.bits_per_byte, metrics.token_mean, metrics.root_mean_square):
        assert function(sums([math.nan, 1], [1, 1], nonfinite=1)) is None
    assert metrics.standard_error(sums([math.inf] * 9, [1] * 9, 1), metrics.perplexity, 1) is None


def test_standard_error_agrees_with_scipy() -> None:
    """With blocks of two windows and equal counts, scipy's bootstrap of block means resamples in the same way."""
    rng = np.random.default_rng(1)
    totals = rng.normal(3.0, 0.3, 40) * 10
    ours = metrics.standard_error(sums(list(totals), [10] * 40), metrics.perplexity, 2)
    blocks = totals.reshape(20, 2).sum(axis=1) / 20
    expected = stats.bootstrap((blocks,), lambda x, axis: np.exp(x.mean(axis=axis)), rng=2, n_resamples=20_000)
    assert ours == pytest.approx(expected.standard_error * math.sqrt(20 / 19), rel=0.03)


@pytest.mark.slow
def test_standard_error_is_right_for_five_blocks() -> None:
    """The error of the mean of five normal values is 1/√5 on average; a plain bootstrap gives √(4/5) of that."""
    rng = np.random.default_rng(2)
    squares = []
    for _ in range(300):
        totals = rng.normal(0.0, 1.0, 5)
        error = metrics.standard_error(sums(list(totals), [1] * 5), metrics.token_mean, 1)
        assert error is not None
        squares.append(error**2)
    assert np.mean(squares) == pytest.approx(1 / 5, rel=0.12)


def test_overflow_gives_none() -> None:
    assert metrics.perplexity(sums([8000.0], [10])) is None


def test_standard_error_below_five_blocks_is_none() -> None:
    nineteen, twenty = sums([30.0] * 19, [10] * 19), sums([30.0 + i for i in range(20)], [10] * 20)
    assert metrics.standard_error(nineteen, metrics.perplexity, 4) is None
    assert metrics.standard_error(twenty, metrics.perplexity, 4) is not None


def test_remaining_windows_join_the_last_block() -> None:
    """22 windows in blocks of 4 are five blocks, the last one with six windows."""
    assert np.bincount(metrics.block_of_window(22, 4)).tolist() == [4, 4, 4, 4, 6]
    totals = [30.0 + i for i in range(22)]
    merged = [sum(totals[4 * b : 4 * b + 4 if b < 4 else 22]) for b in range(5)]
    blocks = sums(merged, [40] * 4 + [60])
    error = metrics.standard_error(sums(totals, [10] * 22), metrics.perplexity, 4)
    assert error == pytest.approx(metrics.standard_error(blocks, metrics.perplexity, 1), rel=1e-12)


def test_standard_error_ignores_the_order_of_windows() -> None:
    ordered = sums([30.0 + i % 7 for i in range(20)], [10] * 20)
    error = metrics.standard_error(ordered, metrics.perplexity, 2)
    assert metrics.standard_error(ordered[::-1], metrics.perplexity, 2) == error
