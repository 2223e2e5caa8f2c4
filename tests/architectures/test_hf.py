"""Every architecture through `hf_quant`: log-probabilities of a plain forward, and references that recover them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from tests.architectures.checkpoints import ARCHITECTURES, Architecture, make_checkpoint
from tests.architectures.conftest import Checkpoint, assert_equal_logprobs, assert_no_divergence

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_equal_a_plain_forward_and_its_reference(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made = checkpoint(name)
    measured = made.measure(made.store)
    assert ReferenceStore.open(made.store).manifest.mode == "hidden"
    assert made.model.describe().dtype == "float32"
    for scores in (made.scores, measured):
        assert_equal_logprobs(scores, made.expected)
        assert_no_divergence(scores, made.expected)
    # not bit for bit: the kernels of Mamba layers are not
    assert_equal_logprobs(measured, [np.asarray(scores.logprobs) for scores in made.scores], 2e-5)


def test_model_that_needs_multimodal_says_so(tmp_path: Path) -> None:
    make_checkpoint("qwen2.5-vl", tmp_path)
    with pytest.raises(UserError, match=r"it also sees pictures: add multimodal=True"):
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu")


def test_forward_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a layer of another order\nand more")

    monkeypatch.setitem(ARCHITECTURES, "one", Architecture("LlamaConfig"))
    make_checkpoint("one", tmp_path)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", broken)
    with pytest.raises(UserError, match=r"its first forward fails \(ValueError: a layer of another order") as error:
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu")
    assert "\n" not in str(error.value)
