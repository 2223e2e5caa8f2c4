"""Aggregates against values worked by hand and against a bootstrap written with scipy."""

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


def test_perplexity_weighs_tokens_not_windows() -> None:
    # NLL 3 over 1 token and 9 over 3: exp(12 / 4)
    assert metrics.perplexity(sums([3, 9], [1, 3])) == pytest.approx(math.exp(3))


def test_bits_per_byte_by_hand() -> None:
    assert metrics.bits_per_byte(sums([math.log(2) * 6], [4])) == pytest.approx(1.5)


def test_not_finite_gives_no_number() -> None:
    for function in (metrics.perplexity, metrics.bits_per_byte):
        assert function(sums([math.nan, 1], [1, 1], nonfinite=1)) is None
    assert metrics.standard_error(sums([math.inf] * 9, [1] * 9, 1), metrics.perplexity, 1) is None


def test_standard_error_agrees_with_scipy() -> None:
    """Blocks of two windows of equal counts: the same resampling as scipy's bootstrap of block means."""
    rng = np.random.default_rng(1)
    totals = rng.normal(3.0, 0.3, 40) * 10
    ours = metrics.standard_error(sums(list(totals), [10] * 40), metrics.perplexity, 2)
    blocks = totals.reshape(20, 2).sum(axis=1) / 20
    theirs = stats.bootstrap((blocks,), lambda x, axis: np.exp(x.mean(axis=axis)), rng=2, n_resamples=20_000)
    assert ours == pytest.approx(theirs.standard_error * math.sqrt(20 / 19), rel=0.03)


def test_standard_error_is_right_for_five_blocks() -> None:
    """Of the mean of five normal values it is 1/√5 on average; a plain bootstrap gives √(4/5) of that."""
    rng = np.random.default_rng(2)
    squares = []
    for _ in range(300):
        totals = rng.normal(0.0, 1.0, 5)
        error = metrics.standard_error(sums(list(totals), [1] * 5), metrics.accuracy, 1)
        assert error is not None
        squares.append(error**2)
    assert np.mean(squares) == pytest.approx(1 / 5, rel=0.12)


def test_overflow_gives_no_number() -> None:
    assert metrics.perplexity(sums([8000.0], [10])) is None


def test_no_error_below_five_blocks() -> None:
    nineteen, twenty = sums([30.0] * 19, [10] * 19), sums([30.0 + i for i in range(20)], [10] * 20)
    assert metrics.standard_error(nineteen, metrics.perplexity, 4) is None
    assert metrics.standard_error(twenty, metrics.perplexity, 4) is not None


def test_windows_over_join_the_last_block() -> None:
    """22 windows in blocks of 4 are five blocks, the last of six; none is left out."""
    blocks = metrics._blocks(sums([1.0] * 22, [1] * 22), 4)
    assert blocks[:, 1].tolist() == [4, 4, 4, 4, 6]


def test_order_of_windows_does_not_matter() -> None:
    ordered = sums([30.0 + i % 7 for i in range(20)], [10] * 20)
    error = metrics.standard_error(ordered, metrics.perplexity, 2)
    assert metrics.standard_error(ordered[::-1], metrics.perplexity, 2) == error
