"""Attention that leaves out what a config asks for: repaired, or refused with one line that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, window_request
from tests.architectures.checkpoints import ARCHITECTURES, Architecture, make_checkpoint, windows

pytestmark = pytest.mark.engine

# Transformers 5.24 runs these models with eager attention itself, so there is nothing to repair or refuse
REPAIRED_UPSTREAM = not getattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)
needs_repair = pytest.mark.skipif(REPAIRED_UPSTREAM, reason="this Transformers applies the soft-cap by default")

CAPPED = {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0}


def requests(count: int = 2) -> list[WindowRequest]:
    return [window_request(str(i), ids, 1, {}, ("text", i, 1)) for i, ids in enumerate(windows(count))]


def checkpoint(monkeypatch: pytest.MonkeyPatch, folder: Path, config: str, **fields: Any) -> Any:
    """Writes a checkpoint; returns its plain forward with eager attention."""
    monkeypatch.setitem(ARCHITECTURES, "one", Architecture(config, fields))
    return make_checkpoint("one", folder)


@pytest.mark.parametrize("config", ["Gemma2Config", "VaultGemmaConfig"])
def test_soft_cap_of_attention_is_applied_and_said(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoint(monkeypatch, tmp_path, config, **CAPPED)
    model = get_model("hf_quant")(pretrained=str(tmp_path), dtype="float32", device="cpu")
    for ids, scores in zip(windows(), model.score_windows(requests()), strict=True):
        np.testing.assert_allclose(scores.logprobs, plain(ids), atol=1e-4)
    assert REPAIRED_UPSTREAM or any(
        "attention is eager" in note and "soft-cap" in note for note in model.describe().notes
    )


@needs_repair
def test_soft_cap_matters_on_these_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' default attention gives other scores, so that the test above can fail."""
    from tests.architectures.checkpoints import logprobs

    plain = checkpoint(monkeypatch, tmp_path, "Gemma2Config", **CAPPED)
    expected = plain(windows()[0])
    model = plain.args[0]
    model.set_attn_implementation("sdpa")
    assert np.abs(logprobs(model, windows()[0]) - expected).max() > 0.1


@needs_repair
def test_attention_that_was_asked_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(monkeypatch, tmp_path, "Gemma2Config", **CAPPED)
    with pytest.raises(UserError, match="attn_implementation=sdpa leaves out the soft-cap of attention scores"):
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu", attn_implementation="sdpa")


@needs_repair
def test_models_without_a_soft_cap_keep_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(monkeypatch, tmp_path, "Gemma2Config", **(CAPPED | {"attn_logit_softcapping": None}))
    model = get_model("hf_quant")(pretrained=str(tmp_path), device="cpu")
    assert not any("eager" in note for note in model.describe().notes)
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}])
def test_field_that_no_attention_applies_is_refused(
    attention: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(monkeypatch, tmp_path, "Gemma3TextConfig", **CAPPED)
    with pytest.raises(UserError, match=r"sets attn_logit_softcapping=3\.0, which Gemma3ForCausalLM .* never applies"):
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu", **attention)


def test_alibi_with_eager_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"alibi": True, "multi_query": True, "num_kv_heads": 1}
    checkpoint(monkeypatch, tmp_path, "FalconConfig", **fields)
    with pytest.raises(UserError, match=r"attn_implementation=eager gets alibi of .* wrong"):
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu", attn_implementation="eager")
    get_model("hf_quant")(pretrained=str(tmp_path), device="cpu")


def test_implementations_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching the calls leaves Transformers' functions in place."""
    from transformers import AttentionInterface
    from transformers.models.gemma2 import modeling_gemma2

    before = dict(AttentionInterface()), modeling_gemma2.eager_attention_forward
    checkpoint(monkeypatch, tmp_path, "Gemma2Config", **CAPPED)
    get_model("hf_quant")(pretrained=str(tmp_path), device="cpu")
    assert (dict(AttentionInterface()), modeling_gemma2.eager_attention_forward) == before
