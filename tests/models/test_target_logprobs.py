"""Log-probabilities of targets, compared with log-softmax in float64; first choices, padding, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmeval_ext.models import target_logprobs as module
from lmeval_ext.models.target_logprobs import target_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 4096, 5003])
def test_logprobs_equal_log_softmax_in_float64(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(70, vocabulary + 5) * 8).to(dtype)  # 5 columns of padding
    targets = torch.randint(vocabulary, (70,))
    logprobs, greedy = target_logprobs(logits, targets, vocabulary)
    table = torch.log_softmax(logits[:, :vocabulary].double(), dim=1)
    assert logprobs.dtype == torch.float32
    np.testing.assert_allclose(logprobs.double(), table.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=4e-6)
    assert (greedy == (logits[:, :vocabulary].argmax(1) == targets)).all()


def test_logprobs_of_three_tokens_are_those_by_hand() -> None:
    """The softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)."""
    logits = torch.tensor([[1.0, 2.0, 5.0]] * 3).log()
    logprobs, greedy = target_logprobs(logits, torch.tensor([0, 1, 2]), 3)
    np.testing.assert_allclose(logprobs.exp(), [0.125, 0.25, 0.625], rtol=1e-6)
    assert greedy.tolist() == [False, False, True]


def test_padding_columns_are_ignored() -> None:
    logits = torch.tensor([[0.0, 0.0, 99.0]])
    logprobs, greedy = target_logprobs(logits, torch.tensor([0]), 2)
    assert logprobs.item() == pytest.approx(np.log(0.5))
    assert greedy.item()


def test_first_choice_of_equal_logits_is_the_lowest_id() -> None:
    _, greedy = target_logprobs(torch.zeros(2, 6), torch.tensor([0, 5]), 6)
    assert greedy.tolist() == [True, False]


def test_nan_logit_gives_nan() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 2] = float("nan")
    logprobs, _ = target_logprobs(logits, torch.tensor([0, 0]), 4)
    assert torch.isnan(logprobs[0])
    assert logprobs[1].item() == pytest.approx(-np.log(4))


def test_no_rows_give_empty_results() -> None:
    logprobs, greedy = target_logprobs(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 4)
    assert logprobs.shape == greedy.shape == (0,)


def test_many_blocks_give_the_same_results_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(11, 9), torch.randint(9, (11,))
    one_block = target_logprobs(logits, targets, 9)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 20)
    for a, b in zip(one_block, target_logprobs(logits, targets, 9), strict=True):
        assert torch.equal(a, b)
