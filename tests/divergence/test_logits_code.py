"""Coded rows of logits: the error bound in the docstring, what stays exact, and the effect on distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeval_ext.divergence.logits_code import EXACT, decode, encode
from tests.fast_guard import examples

INF = math.inf


def below(logits: torch.Tensor) -> np.ndarray:
    """d = max x − x, in float64."""
    x = logits.double().numpy()
    return np.asarray(x.max(axis=1, keepdims=True) - x)


def realistic(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Logits as a language model's: a wide normal bulk and a few tokens far above it."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=rng) * 3
    favoured = torch.randint(vocabulary, (rows, 30), generator=rng)
    return logits.scatter_add_(1, favoured, torch.rand(rows, 30, generator=rng) * 15)


def bound(d: np.ndarray) -> np.ndarray:
    """c = round(65534 √(d/D)) errs by ½ at most, so √d by √D / 131068, and d by 2 √d √D / 131068 + D / 131068²."""
    reach = d.max(axis=1, keepdims=True)
    return np.asarray(np.sqrt(d * reach) / 65534 + reach / 131068**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_error_is_within_the_bound(dtype: torch.dtype) -> None:
    logits = realistic(12, 6000).to(dtype)
    coded = encode(logits)
    decoded = decode(coded)
    d = below(logits)
    error = np.abs(d + decoded.double().numpy())
    assert (error <= bound(d) + 1e-5).all()
    assert error.max() > 0.5 * bound(d).max()  # the bound is tight
    exact = d < np.sort(d, axis=1)[:, EXACT - 1 : EXACT]  # equal values at the border may or may not be exact
    np.testing.assert_allclose(error[exact], 0, atol=2e-6)
    assert (exact.sum(axis=1) > EXACT // 2).all()
    assert {name: t.dtype for name, t in coded.items()} == {
        "codes": torch.int16,
        "range": torch.float32,
        "top_ids": torch.int32,
        "top_values": torch.float32,
    }
    assert coded["codes"].shape == logits.shape
    assert coded["top_ids"].shape == (12, EXACT)


def test_error_equals_the_figure_in_the_docstring() -> None:
    """At d = 8 and D = 30 a logit changes by √(8 · 30) / 65534 + 30 / 131068² = 0.000236 at most."""
    row = -torch.cat([torch.zeros(EXACT), torch.linspace(7.5, 8.0, 5000), torch.tensor([30.0])])[None]
    error = (decode(encode(row)) - row).abs().max().item()
    assert 0.0002 < error < 0.00024


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=700), st.integers(0, 3))
def test_error_of_any_row_is_within_the_bound(values: list[float], ruled_out: int) -> None:
    row = torch.tensor([values + values[::-1] + [-INF] * ruled_out])
    decoded = decode(encode(row)).double().numpy()[0]
    d = below(row)[0]
    finite = np.isfinite(d)
    assert (decoded[~finite] == -INF).all()
    assert (np.abs(d[finite] + decoded[finite]) <= bound(d[finite][None])[0] + 2e-5).all()


def test_minus_infinity_is_kept() -> None:
    logits = realistic(3, 2000)
    logits[:, 100:150] = -INF
    logits[2, 10:] = -INF  # fewer finite values than are stored exactly
    decoded = decode(encode(logits))
    assert torch.equal(decoded == -INF, logits == -INF)
    assert not torch.isnan(decoded).any()


@pytest.mark.parametrize("value", [0.0, -7.25, 1e4])
def test_constant_rows_decode_to_zeros(value: float) -> None:
    assert torch.equal(decode(encode(torch.full((2, 900), value))), torch.zeros(2, 900))


@pytest.mark.parametrize("vocabulary", [1, 2, 200, 255, 256])
def test_small_vocabularies_are_exact(vocabulary: int) -> None:
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)) * 5
    coded = encode(logits)
    assert coded["top_ids"].shape == (5, vocabulary)
    assert torch.equal(decode(coded), logits - logits.amax(1, keepdim=True))


def test_nan_stays_in_its_row() -> None:
    logits = realistic(2, 1000)
    logits[0, 700] = math.nan
    decoded = decode(encode(logits))
    assert torch.isnan(decoded[0]).any()
    assert torch.isfinite(decoded[1]).all()


def test_divergence_by_coding_is_below_1e_8() -> None:
    """For 49,152 logits D_KL(exact ‖ decoded) is below the resolution of float32.

    This holds for rows as a language model's, and for normal ones, whose probability is spread over thousands of tokens
    that are not stored exactly.
    """

    def change(logits: torch.Tensor) -> torch.Tensor:
        exact = torch.log_softmax(logits.double(), 1)
        coded = torch.log_softmax(decode(encode(logits)).double(), 1)
        return (exact.exp() * (exact - coded)).sum(1)

    peaked = change(realistic(40, 49_152))
    assert peaked.max().item() < 1e-8
    spread = change(torch.randn(10, 49_152, generator=torch.Generator().manual_seed(1)) * 3)
    assert spread.max().item() < 1e-8
