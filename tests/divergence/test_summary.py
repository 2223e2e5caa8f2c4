"""Figures from divergences per token, compared with numpy, pandas and bootstraps that are written out here."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeval_ext import metrics
from lmeval_ext.divergence import summary
from lmeval_ext.divergence.summary import WindowDivergence

REFERENCE = {"id": "abc", "label": "full", "engine": "tiny", "dtype": "float32", "role": "comparison", "vocabulary": 50}


def made(windows: int = 12, tokens: int = 30, seed: int = 0, **fixed: Any) -> list[WindowDivergence]:
    """Windows of different lengths and levels, in random order."""
    rng = np.random.default_rng(seed)
    made_windows = []
    for number in range(windows):
        n = tokens + number % 3
        values = {
            "kld": rng.lognormal(-4 + 0.3 * (number % 4), 1.5, n),
            "agree": rng.random(n) < 0.9,
            "reference_logprobs": -rng.exponential(2.0, n),
            "confidence": rng.beta(1.5, 1.0, n),
            "reference": {**REFERENCE, "rounding": {"kld_sum": 1e-4 * n, "kld_max": 1e-3 + number}},
        }
        logprobs = values["reference_logprobs"] - rng.normal(0.01, 0.1, n)
        made_windows.append(WindowDivergence.of(number, {"model_logprobs": logprobs, **values, **fixed}))
    rng.shuffle(made_windows)  # type: ignore[arg-type]
    return made_windows


def table(values: list[WindowDivergence]) -> pd.DataFrame:
    """One row per token, in the order of the windows."""
    frames = [
        pd.DataFrame(
            {
                "window": v.window,
                "kld": v.kld,
                "agree": v.agree,
                "p": np.exp(v.reference_logprobs),
                "q": np.exp(v.logprobs),
                "change": v.reference_logprobs - v.logprobs,
                "confidence": v.confidence,
            }
        )
        for v in values
    ]
    return pd.concat(frames).sort_values("window", kind="stable").reset_index(drop=True)


def mean_of(name: str, values: list[WindowDivergence]) -> float | None:
    return metrics.statistic_of(name)([v.sums()[name] for v in values])


# ---------------------------------------------------------------------- means


def test_means_equal_values_by_hand() -> None:
    """Two tokens: p = 1/2, q = 1/4 and p = 1/8, q = 1/2 of the true one. Δp = −1/4 and 3/8.

    Mean 1/16; RMS √((4/64 + 9/64) / 2) = √(13/128); ln p − ln q = ln 2 and −ln 4: PPL ratio exp(−½ ln 2) = 1/√2.
    """
    divergence = {
        "kld": [0.25, 0.75],
        "agree": [True, False],
        "reference_logprobs": np.log([1 / 2, 1 / 8]),
        "confidence": [0.5, 0.9],
        "reference": REFERENCE,
    }
    values = [WindowDivergence.of(0, divergence | {"model_logprobs": np.log([1 / 4, 1 / 2])})]
    assert mean_of("kld", values) == pytest.approx(0.5)
    assert mean_of("top1_agreement", values) == pytest.approx(0.5)
    assert mean_of("mean_delta_p", values) == pytest.approx(1 / 16)
    assert mean_of("rms_delta_p", values) == pytest.approx(math.sqrt(13 / 128))
    assert mean_of("ppl_ratio", values) == pytest.approx(1 / math.sqrt(2))
    assert str(values[0]) == "2 tokens"


def test_means_weight_tokens_equally_not_windows() -> None:
    values = made()
    tokens = table(values)
    delta = tokens.q - tokens.p
    assert mean_of("kld", values) == pytest.approx(tokens.kld.mean())
    assert mean_of("top1_agreement", values) == pytest.approx(tokens.agree.mean())
    assert mean_of("mean_delta_p", values) == pytest.approx(delta.mean())
    assert mean_of("rms_delta_p", values) == pytest.approx(math.sqrt((delta**2).mean()))
    ratio = np.exp(-np.log(tokens.q).mean()) / np.exp(-np.log(tokens.p).mean())  # perplexity over perplexity
    assert mean_of("ppl_ratio", values) == pytest.approx(ratio)


def bootstrap(
    values: list[WindowDivergence], block_windows: int, statistic: Any, draws: int = 1500, seed: int = 1
) -> Any:
    """Standard error from resamples that are really built, with numpy alone; several if the statistic has several.

    Blocks of windows are drawn with replacement, with all their tokens. Windows that do not fill a block join the last
    one. The deviation is multiplied by √(B / (B − 1)). statistic: of a dictionary of the columns of `table`.
    """
    tokens = table(values)
    blocks = len(values) // block_windows
    block = (tokens.window // block_windows).clip(upper=blocks - 1).to_numpy()
    parts = [np.flatnonzero(block == number) for number in range(blocks)]  # positions of each block's tokens
    columns = {name: column.to_numpy() for name, column in tokens.items()}
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(draws):
        positions = np.concatenate([parts[number] for number in rng.integers(blocks, size=blocks)])
        figures.append(statistic({name: column[positions] for name, column in columns.items()}))
    return np.std(figures, axis=0, ddof=1) * math.sqrt(blocks / (blocks - 1))


def test_errors_of_means_equal_resamples_that_are_built() -> None:
    """The statistics are written out here; for ppl_ratio both perplexities are over the same tokens."""
    statistics: dict[str, Any] = {
        "kld": lambda t: t["kld"].mean(),
        "top1_agreement": lambda t: t["agree"].mean(),
        "mean_delta_p": lambda t: (t["q"] - t["p"]).mean(),
        "rms_delta_p": lambda t: math.sqrt(((t["q"] - t["p"]) ** 2).mean()),
        "ppl_ratio": lambda t: np.exp(-np.log(t["q"]).mean()) / np.exp(-np.log(t["p"]).mean()),
    }
    assert set(statistics) == set(summary.MEANS)
    values = made(windows=26)
    expected = bootstrap(values, 2, lambda t: [statistic(t) for statistic in statistics.values()])
    for name, error in zip(statistics, expected, strict=True):
        ours = metrics.standard_error([v.sums()[name] for v in values], metrics.statistic_of(name), 2)
        assert ours == pytest.approx(error, rel=0.06), name  # 1,500 draws scatter by 1.8 %


def test_error_of_ppl_ratio_is_smaller_than_that_of_a_perplexity() -> None:
    values = made(windows=26)
    paired = metrics.standard_error([v.sums()["ppl_ratio"] for v in values], metrics.perplexity, 2)
    alone = bootstrap(values, 2, lambda t: np.exp(-np.log(t["q"]).mean()), draws=500)
    perplexity = np.exp(-np.log(table(values).q).mean())
    assert paired is not None
    assert paired < 0.2 * alone / perplexity


# ---------------------------------------------------------------------- quantiles


@pytest.mark.parametrize("percent", [0.0, 1.0, 10.0, 50.0, 90.0, 99.0, 99.9, 100.0])
def test_quantile_equals_pandas_and_numpy(percent: float) -> None:
    values = made()
    kld = table(values).kld
    assert summary.quantile(values, percent) == pytest.approx(float(kld.quantile(percent / 100)))
    assert summary.quantile(values, percent) == float(np.percentile(kld, percent))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(0, 100))
def test_quantile_of_any_values_follows_its_definition(kld: list[float], percent: float) -> None:
    """(n − 1) q tokens are below the quantile, which is linear in between."""
    divergence = {"kld": kld, "agree": [True] * len(kld), "reference_logprobs": kld, "confidence": kld, "reference": {}}
    value = summary.quantile([WindowDivergence.of(0, divergence | {"model_logprobs": kld})], percent)
    position, ordered = percent / 100 * (len(kld) - 1), sorted(kld)
    low, high = ordered[math.floor(position)], ordered[min(math.floor(position) + 1, len(kld) - 1)]
    assert value == pytest.approx(low + (position - math.floor(position)) * (high - low), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0])
@pytest.mark.parametrize(("windows", "block_windows"), [(12, 1), (23, 2), (11, 2)])
def test_errors_of_quantiles_equal_resamples_that_are_built(percent: float, windows: int, block_windows: int) -> None:
    """With the same draws, but with every resample really built, the error is equal up to rounding."""
    values = made(windows=windows, seed=3)
    ordered = sorted(values, key=lambda v: v.window)
    blocks = windows // block_windows
    parts = [
        np.concatenate([v.kld for i, v in enumerate(ordered) if min(i // block_windows, blocks - 1) == b])
        for b in range(blocks)
    ]
    rng = np.random.default_rng(20240229)
    quantiles = [
        np.percentile(np.concatenate([parts[b] for b in rng.integers(blocks, size=blocks)]), percent)
        for _ in range(1000)
    ]
    expected = np.std(quantiles, ddof=1) * math.sqrt(blocks / (blocks - 1))
    assert summary.quantile_error(values, percent, block_windows) == pytest.approx(expected, rel=1e-9)


def test_errors_of_quantiles_agree_between_seeds() -> None:
    values = made(windows=40)
    other = bootstrap(values, 2, lambda t: np.percentile(t["kld"], 90), seed=9)
    assert summary.quantile_error(values, 90.0, 2) == pytest.approx(other, rel=0.12)


def test_error_of_equal_values_is_zero() -> None:
    values = made(kld=[0.5] * 30, agree=[True] * 30, reference_logprobs=[0.0] * 30, confidence=[0.5] * 30)
    assert summary.quantile_error(values, 90.0, 1) == 0


@pytest.mark.parametrize("percent", [99.9, 100.0])
def test_error_beyond_the_99th_percentile_is_none(percent: float) -> None:
    assert summary.quantile_error(made(windows=40), percent, 1) is None


def test_errors_below_five_blocks_are_none() -> None:
    assert summary.quantile_error(made(windows=9), 50.0, 2) is None
    assert summary.quantile_error(made(windows=10), 50.0, 2) is not None
    buckets = summary.describe(made(windows=9), 2)["by_confidence"]
    assert [b["kld_stderr"] for b in buckets] == [None] * 5
    assert None not in [b["kld"] for b in buckets]


def test_figures_ignore_the_order_of_windows() -> None:
    values = made()
    assert summary.quantile_error(values, 90.0, 2) == summary.quantile_error(values[::-1], 90.0, 2)
    assert summary.describe(values, 2) == summary.describe(values[::-1], 2)


# ---------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["kld", "logprobs"])
def test_nonfinite_values_give_none(bad: float, where: str) -> None:
    values = made()
    getattr(values[4], where)[7] = bad if where == "kld" else -bad
    for name in summary.MEANS:
        assert mean_of(name, values) is None, name
    if where == "kld":
        assert summary.quantile(values, 50.0) is None
        assert summary.quantile_error(values, 50.0, 1) is None
        description = summary.describe(values, 1)
        assert description["quantiles"] is None
        assert description["histogram"] is None
        assert sum(b["kld"] is None for b in description["by_confidence"]) == 1
    json.dumps(summary.describe(values, 1), allow_nan=False)


# ---------------------------------------------------------------------- the description


def test_buckets_equal_pandas() -> None:
    values = made(windows=26)
    tokens = table(values)
    edges = [0, 0.25, 0.5, 0.75, 0.95, 1.0000001]
    groups = tokens.groupby(pd.cut(tokens.confidence, edges, right=False), observed=False)
    buckets = summary.describe(values, 2)["by_confidence"]

    def means(drawn: dict[str, np.ndarray]) -> list[float]:
        bucket = np.digitize(drawn["confidence"], edges) - 1
        return [drawn["kld"][bucket == number].mean() for number in range(5)]

    errors = bootstrap(values, 2, means, draws=1000)
    for bucket, (_, group), error in zip(buckets, groups, errors, strict=True):
        assert bucket["tokens"] == len(group)
        assert bucket["kld"] == pytest.approx(group.kld.mean())
        assert bucket["top1_agreement"] == pytest.approx(group.agree.mean())
        assert bucket["kld_stderr"] == pytest.approx(error, rel=0.12)


def test_edge_belongs_to_the_bucket_above() -> None:
    """[0, .25) [.25, .5) [.5, .75) [.75, .95) [.95, 1]: 1 belongs to the last bucket."""
    confidence = [0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9499, 0.95, 1.0]
    n = len(confidence)
    divergence = {"kld": np.arange(n), "agree": [True] * n, "reference_logprobs": [0.0] * n, "reference": REFERENCE}
    values = [WindowDivergence.of(0, divergence | {"model_logprobs": [0.0] * n, "confidence": confidence})]
    buckets = summary.describe(values, 1)["by_confidence"]
    assert [(b["from"], b["to"], b["tokens"]) for b in buckets] == [
        (0.0, 0.25, 2), (0.25, 0.5, 1), (0.5, 0.75, 2), (0.75, 0.95, 2), (0.95, 1.0, 2),
    ]  # fmt: skip
    assert [b["kld"] for b in buckets] == [0.5, 2, 3.5, 5.5, 7.5]


def test_figures_of_an_empty_bucket_are_none() -> None:
    buckets = summary.describe(made(windows=6, confidence=np.full(30, 0.6), **_thirty()), 1)["by_confidence"]
    assert [b["tokens"] for b in buckets] == [0, 0, 180, 0, 0]
    assert buckets[0]["kld"] is buckets[0]["top1_agreement"] is buckets[0]["kld_stderr"] is None


def _thirty() -> dict[str, Any]:
    return {"kld": np.arange(30.0), "agree": [True] * 30, "reference_logprobs": np.zeros(30)}


def test_histogram_counts_equal_values_by_hand() -> None:
    """Bins are quarters of powers of ten from 1e-10 to 100; smaller and negative values are `below`, larger `above`."""
    kld = np.array([-1e-7, 0.0, 0.9e-10, 1e-10, 1.7e-10, 1.8e-10, 0.5, 99.0, 100.0, 101.0] + [0.2] * 20)
    description = summary.describe(
        [
            WindowDivergence.of(
                0, _thirty() | {"model_logprobs": [0.0] * 30, "kld": kld, "confidence": kld, "reference": {}}
            )
        ],
        1,
    )
    histogram = description["histogram"]
    assert (histogram["below"], histogram["above"]) == (3, 1)
    assert len(histogram["counts"]) == 48 == len(histogram["log10_edges"]) - 1
    assert (histogram["log10_edges"][0], histogram["log10_edges"][-1]) == (-10, 2)
    assert sum(histogram["counts"]) + 4 == len(kld)
    assert histogram["counts"][:2] == [2, 1]  # 10^-9.75 = 1.778e-10
    assert histogram["counts"][-1] == 2  # 10^1.75 = 56.2 up to and including 100
    assert histogram["counts"][int((math.log10(0.2) + 10) * 4)] == 20


def test_description_has_quantiles_reference_and_rounding() -> None:
    values = made()
    description = summary.describe(values, 2)
    kld = table(values).kld
    assert description["tokens"] == len(kld)
    assert description["quantiles"] == pytest.approx(
        {f"{q:g}": float(kld.quantile(q / 100)) for q in summary.QUANTILES}
    )
    assert set(description["quantiles"]) == {"1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9"}
    assert description["role"] == "comparison"
    assert description["vocabulary"] == 50
    assert description["reference"] == {"id": "abc", "label": "full", "engine": "tiny", "dtype": "float32"}
    assert description["rounding"] == {
        "kld": pytest.approx(1e-4), "kld_max": pytest.approx(11.001), "engine": "tiny", "dtype": "float32",
    }  # fmt: skip
    json.dumps(description, allow_nan=False)


def test_unknown_rounding_of_one_window_gives_none() -> None:
    assert summary.describe([*made(3), *made(1, reference=REFERENCE)], 1)["rounding"] is None
