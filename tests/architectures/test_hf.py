"""Every architecture through `hf_quant`: log-probabilities of a plain forward, and references that recover them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, window_request
from tests.architectures.checkpoints import ARCHITECTURES, Architecture, make_checkpoint, windows

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def requests() -> list[WindowRequest]:
    return [window_request(str(i), ids, 1, {}, ("text", i, 1)) for i, ids in enumerate(windows())]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_equal_a_plain_forward_and_its_reference(name: str, tmp_path: Path) -> None:
    plain = make_checkpoint(name, tmp_path / "model")
    store = str(tmp_path / "store")
    model = get_model("hf_quant")(
        pretrained=str(tmp_path / "model"),
        dtype="float32",
        device="cpu",
        batch_size=2,
        multimodal=ARCHITECTURES[name].multimodal,
        save_reference=store,
    )
    written = model.score_checked(requests())
    model.reference_arguments = ReferenceArguments(reference=store)
    measured = model.score_checked(requests())
    assert ReferenceStore.open(store).manifest.mode == "hidden"
    assert model.describe().dtype == "float32"
    for ids, first, second in zip(windows(), written, measured, strict=True):
        expected = plain(ids)
        np.testing.assert_allclose(first.logprobs, expected, atol=1e-4)
        # not bit for bit: the kernels of Mamba layers are not
        np.testing.assert_allclose(second.logprobs, first.logprobs, atol=2e-5)
        for scores in (first, second):
            assert np.abs((scores.divergence or {})["kld"]).max() < 1e-6
            np.testing.assert_allclose((scores.divergence or {})["reference_logprobs"], expected, atol=1e-4)


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
