"""Figures by position, compared with pandas, scipy's line and a bootstrap that is written out here."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lmeval_ext import positions
from lmeval_ext.metrics import WindowSum
from lmeval_ext.positions import PositionedSum, WindowCurve


def made(windows: int = 14, tokens: int = 100, first: int = 1, seed: int = 0) -> tuple[list[WindowCurve], pd.DataFrame]:
    """Curves of windows whose divergence grows with the position, in random order, and their tokens one per row."""
    rng = np.random.default_rng(seed)
    frames, curves = [], []
    for window in range(windows):
        position = first + np.arange(tokens - window % 2)
        values = {
            "kld": rng.lognormal(-4, 1, len(position)) + 0.002 * np.log2(position) * (1 + window % 3),
            "ppl_ratio": rng.normal(0.01, 0.2, len(position)),
            "top1_agreement": (rng.random(len(position)) < 0.9).astype(np.float64),
        }
        curves.append(WindowCurve.of(window, first, values))
        frames.append(pd.DataFrame({"window": window, "position": position, **values}))
    rng.shuffle(curves)  # type: ignore[arg-type]
    return curves, pd.concat(frames, ignore_index=True)


def in_bins(frame: pd.DataFrame, edges: list[int]) -> Any:
    return frame.groupby(pd.cut(frame["position"], edges, right=False), observed=True)


def test_bins_double_from_16_on_and_end_with_the_tokens() -> None:
    curves, frame = made(tokens=100)
    found = positions.describe(curves, 1)
    assert found["edges"] == [1, 16, 32, 64, 101]
    assert found["tokens"] == in_bins(frame, found["edges"]).size().tolist()
    assert positions.describe(made(tokens=255, first=257)[0], 1)["edges"] == [257, 512]
    assert positions.describe(made(tokens=3, first=15)[0], 1)["edges"] == [15, 16, 18]


@pytest.mark.parametrize("first", [1, 40])
def test_values_and_slopes_match_pandas_and_scipy(first: int) -> None:
    curves, frame = made(first=first)
    found = positions.describe(curves, 1)
    for metric in ("kld", "ppl_ratio", "top1_agreement"):
        means = in_bins(frame, found["edges"])[metric].mean()
        expected = np.exp(means) if metric == "ppl_ratio" else means
        np.testing.assert_allclose(found["metrics"][metric]["values"], expected, rtol=1e-12)
        line = stats.linregress(np.log2(frame["position"]), frame[metric])
        assert found["metrics"][metric]["slope"] == pytest.approx(line.slope, rel=1e-9)


@pytest.mark.parametrize("block_windows", [1, 2])
def test_errors_match_a_bootstrap_over_the_tokens(block_windows: int) -> None:
    curves, frame = made()
    found = positions.describe(curves, block_windows)
    frame["block"] = np.minimum(frame["window"] // block_windows, 14 // block_windows - 1)
    blocks = [part[["position", "kld"]].to_numpy() for _, part in frame.groupby("block")]
    assert found["blocks"] == len(blocks)
    rng = np.random.default_rng(5)
    bins, slopes = [], []
    for _ in range(1000):
        position, kld = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))]).T
        bin_of = np.digitize(position, found["edges"])
        bins.append([kld[bin_of == b].mean() for b in range(1, len(found["edges"]))])
        slopes.append(np.polyfit(np.log2(position), kld, 1)[0])
    factor = math.sqrt(len(blocks) / (len(blocks) - 1))
    # The error of a standard deviation over 1000 resamples is 2 %
    np.testing.assert_allclose(found["metrics"]["kld"]["stderr"], factor * np.std(bins, axis=0, ddof=1), rtol=0.1)
    assert found["metrics"]["kld"]["slope_stderr"] == pytest.approx(factor * np.std(slopes, ddof=1), rel=0.1)


def test_sums_by_block_add_up_and_are_of_32_blocks_at_most() -> None:
    curves, frame = made(windows=75)
    found = positions.describe(curves, 1)
    assert found["blocks"] == len(found["block_tokens"]) == 32
    frame["block"] = frame["window"] * 32 // 75
    by_bin = frame.groupby(["block", pd.cut(frame["position"], found["edges"], right=False)], observed=True)["kld"]
    np.testing.assert_allclose(found["metrics"]["kld"]["block_totals"], by_bin.sum().unstack(), rtol=1e-12)
    np.testing.assert_array_equal(found["block_tokens"], by_bin.size().unstack())
    x = np.log2(frame["position"])
    products = (x * frame["kld"]).groupby(frame["block"]).sum()
    np.testing.assert_allclose(found["metrics"]["kld"]["block_products"], products, rtol=1e-12)
    moments = pd.DataFrame({"x": x, "xx": x**2}).groupby(frame["block"]).sum()
    np.testing.assert_allclose(found["block_x"], moments, rtol=1e-12)


def test_errors_are_null_below_five_blocks() -> None:
    found = positions.describe(made(windows=4)[0], 1)
    assert found["blocks"] == 4
    for figures in found["metrics"].values():
        assert set(figures["stderr"]) == {None}
        assert figures["slope_stderr"] is None
        assert figures["slope"] is not None
    assert positions.describe(made(windows=14)[0], 3)["metrics"]["kld"]["slope_stderr"] is None


def test_a_bin_that_only_one_window_has_gets_no_error() -> None:
    """As in `wiki2_sliding`, whose first window alone scores early positions."""
    rng = np.random.default_rng(1)
    firsts = [1, *[64] * 9]
    curves = [WindowCurve.of(i, a, {"kld": rng.random(128 - a)}) for i, a in enumerate(firsts)]
    figures = positions.describe(curves, 1)["metrics"]["kld"]
    assert [error is None for error in figures["stderr"]] == [True, True, True, False]
    assert None not in figures["values"]
    assert figures["slope_stderr"] is not None


def test_a_value_that_is_not_finite_empties_its_bin_and_the_slope() -> None:
    curves, _ = made()
    values = {name: np.full(50, 0.5) for name in ("kld", "ppl_ratio", "top1_agreement")}
    values["kld"][20] = math.nan
    curves[curves.index(next(c for c in curves if c.window == 3))] = WindowCurve.of(3, 1, values)
    found = positions.describe(curves, 1)["metrics"]
    assert [value is None for value in found["kld"]["values"]] == [False, True, False, False]
    assert [error is None for error in found["kld"]["stderr"]] == [False, True, False, False]
    assert found["kld"]["slope"] is found["kld"]["slope_stderr"] is None
    assert None not in found["ppl_ratio"]["values"]
    json.dumps(found, allow_nan=False)


def test_one_position_has_no_slope() -> None:
    found = positions.describe([WindowCurve.of(i, 5, {"kld": np.array([0.1 * i])}) for i in range(8)], 1)
    assert found["edges"] == [5, 6]
    assert found["metrics"]["kld"]["slope"] is None


def test_sum_with_a_curve_is_written_and_exchanged_as_a_sum() -> None:
    plain: WindowSum = {"window": 2, "total": 1.5, "count": 3, "nonfinite": 0}
    carried = PositionedSum(plain, WindowCurve.of(2, 1, {"kld": np.array([0.5, 0.5, 0.5])}))
    assert json.loads(json.dumps(carried)) == plain
    again = pickle.loads(pickle.dumps(carried))
    assert again == plain
    assert again.curve.totals["kld"].sum() == 1.5
