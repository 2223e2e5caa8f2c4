"""D_KL of rows of logits, compared with values by hand and scipy in float64; ties, -inf, NaN; the fused kernel."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy

from lmeval_ext.divergence import measure as module
from lmeval_ext.divergence.measure import TokenDivergence, fetched, token_divergence
from tests.conftest import ROOT
from tests.fast_guard import examples

INF, NAN = math.inf, math.nan


def measured(reference: Any, logits: Any, targets: Any = None, vocabulary: int | None = None) -> TokenDivergence:
    """`token_divergence` of lists or tensors; by default target 0 and all columns."""
    p, q = (rows if isinstance(rows, torch.Tensor) else torch.tensor(rows) for rows in (reference, logits))
    ids = torch.zeros(len(q), dtype=torch.int64) if targets is None else torch.tensor(targets)
    return token_divergence(p, q, ids, vocabulary or q.shape[1])


def in_float64(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> Any:
    """The fields of `TokenDivergence` by scipy, with another formula."""
    p, q = (log_softmax(x[:, :vocabulary].double().numpy(), axis=1) for x in (reference, logits))
    return {
        "kld": rel_entr(np.exp(p), np.exp(q)).sum(axis=1),
        "agree": p.argmax(axis=1) == q.argmax(axis=1),
        "reference_logprobs": np.take_along_axis(p, targets.numpy()[:, None], axis=1)[:, 0],
        "model_logprobs": np.take_along_axis(q, targets.numpy()[:, None], axis=1)[:, 0],
        "confidence": np.exp(p.max(axis=1)),
    }


def assert_like(divergence: TokenDivergence, expected: dict[str, np.ndarray]) -> None:
    for name, values in fetched(divergence).items():
        if name == "agree":
            assert (values == expected[name]).all()
        else:
            np.testing.assert_allclose(values, expected[name], rtol=2e-6, atol=4e-6, err_msg=name)


# ---------------------------------------------------------------------- by hand


def test_divergence_of_three_tokens_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2).

    D_KL(p ‖ q) = ½ ln 2 + ¼ ln 1 + ¼ ln ½ = ¼ ln 2 = 0.173287. The first choices are tokens 0 and 2; the true token is
    0, whose log-probability under p is ln ½; p's largest probability is ½. Logits are logarithms up to a constant, here
    +3 and −7.
    """
    p = torch.tensor([[0.5, 0.25, 0.25]]).log() + 3
    q = torch.tensor([[0.25, 0.25, 0.5]]).log() - 7
    divergence = measured(p, q)
    assert divergence.kld.item() == pytest.approx(math.log(2) / 4, abs=1e-7)
    assert divergence.agree.tolist() == [False]
    assert divergence.reference_logprobs.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert divergence.confidence.item() == pytest.approx(0.5, abs=1e-7)


def test_direction_is_from_reference_to_model() -> None:
    """p = (1/2, 1/4, 1/4), u = (1/3, 1/3, 1/3): the two directions differ.

    D_KL(p ‖ u) = ln 3 − H(p) = ln 3 − (½ ln 2 + 2 · ¼ ln 4) = ln 3 − 3/2 ln 2 = 0.058892.
    D_KL(u ‖ p) = −ln 3 + ⅓ (ln 2 + 2 ln 4) = 5/3 ln 2 − ln 3 = 0.056633.
    """
    p, u = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.zeros(1, 3)
    assert measured(p, u).kld.item() == pytest.approx(math.log(3) - 1.5 * math.log(2), abs=1e-7)
    assert measured(u, p).kld.item() == pytest.approx(5 / 3 * math.log(2) - math.log(3), abs=1e-7)


def test_ties_are_resolved_to_the_lowest_id() -> None:
    """Of equal logits the lowest id is the first choice, for reference and model."""
    divergence = measured([[1.0, 1.0, 0.0]] * 3, [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    assert divergence.agree.tolist() == [True, False, True]


def test_token_of_zero_reference_probability_adds_nothing() -> None:
    """p = (1/2, 0, 1/2), q = (1/4, 1/2, 1/4): ½ ln 2 twice; if the model gives it zero too, ln 1."""
    p = [[0.0, -INF, 0.0]] * 2
    q = [[0.0, math.log(2), 0.0], [0.0, -INF, 0.0]]
    divergence = measured(p, q, [0, 1])
    np.testing.assert_allclose(divergence.kld, [math.log(2), 0.0], atol=1e-7)
    np.testing.assert_allclose(divergence.reference_logprobs, [-math.log(2), -INF], rtol=1e-6)


def test_token_of_zero_model_probability_makes_it_infinite() -> None:
    divergence = measured([[0.0, 0.0, 0.0], [0.0, -200.0, 0.0]], [[0.0, -INF, 0.0]] * 2)
    assert divergence.kld[0].item() == INF
    # e⁻²⁰⁰ is 0 in float32: the reference gives it zero probability too
    assert divergence.kld[1].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, 2])
def test_nan_makes_its_row_nan(side: int, column: int) -> None:
    """Even if the reference gives the token zero probability."""
    rows = [torch.tensor([[1.0, 0.0, -INF]] * 2), torch.tensor([[1.0, 0.0, 0.0]] * 2)]
    rows[side][0, column] = NAN
    divergence = measured(*rows)
    assert math.isnan(divergence.kld[0].item())
    assert math.isfinite(divergence.kld[1].item())


def test_padding_is_ignored() -> None:
    p, q = torch.tensor([[0.0, 0.0, 99.0, NAN]]), torch.tensor([[0.0, math.log(3), 99.0]])
    divergence = measured(p, q, vocabulary=2)
    # p = (1/2, 1/2), q = (1/4, 3/4): ½ ln 2 + ½ ln ⅔
    assert divergence.kld.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert divergence.confidence.item() == pytest.approx(0.5)


# ---------------------------------------------------------------------- against scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 4096, 5003])
def test_equals_scipy_in_float64(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    reference = torch.randn(70, vocabulary + 5) * 4  # 5 columns of padding
    logits = (reference + torch.randn(70, vocabulary + 5)).to(dtype)[:, : vocabulary + 2]
    reference[:, vocabulary:] = 1e4
    targets = torch.randint(vocabulary, (70,))
    divergence = token_divergence(reference, logits, targets, vocabulary)
    assert {name: t.dtype for name, t in divergence._asdict().items()} == dict.fromkeys(
        divergence._fields, torch.float32
    ) | {"agree": torch.bool}
    assert_like(divergence, in_float64(reference, logits, targets, vocabulary))


def test_equals_scipy_entropy() -> None:
    """scipy.stats.entropy normalizes by itself."""
    torch.manual_seed(1)
    p, q = torch.randn(9, 50) * 3, torch.randn(9, 50) * 3
    expected = entropy(p.double().exp(), q.double().exp(), axis=1)
    np.testing.assert_allclose(measured(p, q).kld, expected, rtol=2e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_error_for_nearly_equal_logits_is_below_1e_6(size: float) -> None:
    """For models that hardly differ D_KL is about half the variance of their logits' difference, 5e-5 to 5e-9 here.

    The error stays below 1e-6, including that of sums of 50,000 terms.
    """
    torch.manual_seed(2)
    p = torch.randn(20, 50_000) * 3
    q = p + size * torch.randn(20, 50_000)
    expected = in_float64(p, q, torch.zeros(20, dtype=torch.int64), 50_000)["kld"]
    np.testing.assert_allclose(measured(p, q).kld, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(measured(p, p.clone()).kld, 0, atol=5e-7)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p, q, targets = torch.randn(11, 9), torch.randn(11, 9), torch.randint(9, (11,))
    expected = token_divergence(p, q, targets, 9)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 20)
    for a, b in zip(expected, token_divergence(p, q, targets, 9), strict=True):
        assert torch.equal(a, b)


rows_of_logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@settings(max_examples=examples(100), deadline=None)
@given(rows_of_logits, st.integers(0, 2**32 - 1), st.floats(0.0, 10.0))
def test_never_negative_and_zero_for_shifted_logits(row: list[float], seed: int, size: float) -> None:
    """Gibbs' inequality, up to rounding; adding a constant to all logits changes nothing."""
    p = torch.tensor([row])
    moved = p + size * torch.from_numpy(np.random.default_rng(seed).normal(size=p.shape)).float()
    assert measured(p, moved).kld.item() >= -1e-6
    # 2^k for whole k ≤ 3: p + 8 loses bits below 2⁻¹⁹, far below the tolerance
    shifted = measured(p, p + 8.0)
    assert shifted.kld.item() == pytest.approx(0, abs=1e-6)
    expected = in_float64(p, moved, torch.tensor([0]), p.shape[1])
    np.testing.assert_allclose(measured(p, moved).kld, expected["kld"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- the fused kernel, without a GPU

# Runs in another process, because Triton reads TRITON_INTERPRET when it is imported. Prints nothing if it succeeds.
INTERPRETED = """
import math, torch
from lmeval_ext.divergence import measure_triton
from lmeval_ext.divergence.measure import TokenDivergence, fetched
from tests.divergence.test_measure import assert_like, in_float64
import numpy as np
measure_triton._BLOCK = 64

def fused(*arguments):
    return TokenDivergence(*measure_triton.token_divergence_triton(*arguments))

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocabulary in (7, 64, 200):
        torch.manual_seed(0)
        reference = torch.randn(5, vocabulary + 5) * 4
        logits = (reference + torch.randn(5, vocabulary + 5)).to(dtype)[:, : vocabulary + 2]
        reference[:, vocabulary:] = 1e4
        targets = torch.randint(vocabulary, (5,))
        expected = in_float64(reference, logits, targets, vocabulary)
        assert_like(fused(reference, logits, targets, vocabulary), expected)
        # other layouts and another type: rows of a wider matrix, columns that are not adjacent
        assert_like(fused(reference.t().contiguous().t(), logits, targets, vocabulary), expected)
        wide = reference.double()[:, :vocabulary]
        assert_like(fused(wide, logits, targets, vocabulary), expected)

inf, zero = math.inf, torch.zeros(4, dtype=torch.int64)
p = torch.tensor([[0.0, -inf, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, -inf]])
q = torch.tensor([[0.0, math.log(2), 0.0], [0.0, -inf, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, math.nan]])
divergence = fused(p, q, zero, 3)
np.testing.assert_allclose(divergence.kld[:2], [math.log(2), inf], atol=1e-6)
assert divergence.agree[2] and math.isnan(divergence.kld[3]), divergence
# sums are rescaled as larger logits come: each block's are larger than all before, by 0.1 and by 200
for step in (0.1, 200):
    torch.manual_seed(1)
    p = torch.randn(4, 200) + step * torch.arange(200) // 64 * 64
    q = p + torch.randn(4, 200)
    assert_like(fused(p, q, zero + 199, 200), in_float64(p, q, zero + 199, 200))
# a token of zero model probability in the first block has no weight if one 200 nats above it follows; with 5 it has
p = torch.full((2, 200), -inf)
p[:, 5], p[0, 150], p[1, 150] = 0, 200, 5
q = torch.full((2, 200), -inf)
q[:, 150] = 1
divergence = fused(p, q, zero[:2] + 150, 200)
assert divergence.kld.tolist() == [0, inf], divergence.kld
# the same if the largest logit grows in steps, none of which alone removes its weight
p = torch.full((2, 200), -100.0)
p[:, 5], p[:, 70], p[0, 150], p[1, 150] = 0, 60, 120, 61
q = p.clone()
q[:, 5] = -inf
assert fused(p, q, zero[:2] + 150, 200).kld.tolist() == [0, inf]
# ties over more than one block, in the same lane and in others: the lowest id
p, q = torch.zeros(3, 200), torch.zeros(3, 200)
p[:, 70], p[:, 134], p[:, 192] = 1, 1, 1
q[0, 70], q[0, 198], q[0, 195], q[1, 134], q[2, 3] = 1, 1, 1, 1, 1
assert fused(p, q, zero[:3], 200).agree.tolist() == [True, False, False]
"""


@pytest.mark.slow
def test_fused_kernel_in_the_interpreter_equals_scipy() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; its interpreter runs the GPU kernel without a GPU")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
