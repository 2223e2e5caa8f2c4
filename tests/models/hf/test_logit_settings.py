"""What models do to their output matrix' products is measured: under any name, with any meaning, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.models.hf.first_forward import first_forward
from lmeval_ext.models.hf.logit_settings import LogitSettings, fitted
from tests.architectures.checkpoints import _TEXT, _VISION, ARCHITECTURES, Architecture, make_checkpoint, make_model
from tests.conftest import VOCABULARY
from tests.models.hf.test_attention import requests

pytestmark = pytest.mark.engine

MLA = ARCHITECTURES["deepseek-v3"].fields
RECURRENT = {"num_key_value_heads": 1, "lru_width": 128, "attention_window_size": 24, "head_dim": 32}
XLSTM = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4}
# config: (fields, softcap, scale), by the model's own source
MODELS: dict[str, tuple[dict[str, Any], float | None, float]] = {
    "LlamaConfig": ({}, None, 1.0),
    "GraniteConfig": ({"logits_scaling": 6.0}, None, 1 / 6),
    "HyperCLOVAXConfig": ({"logits_scaling": 0.4}, None, 0.4),
    "MiniCPM3Config": ({**MLA, "dim_model_base": 64}, None, 1.0),  # it divides the hidden states
    "CohereConfig": ({"logit_scale": 0.0625}, None, 0.0625),
    "RecurrentGemmaConfig": ({**RECURRENT, "logits_soft_cap": 30.0}, 30.0, 1.0),
    "NanoChatConfig": ({"final_logit_softcapping": 15.0}, 15.0, 1.0),
    "xLSTMConfig": ({**XLSTM, "output_logit_soft_cap": 30.0}, 30.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MODELS)
def test_cap_and_scale_are_measured_exactly(config: str, dtype: torch.dtype) -> None:
    fields, softcap, scale = MODELS[config]
    model = make_model(Architecture(config, fields, plain=config == "xLSTMConfig")).to(dtype)
    settings = first_forward(model, range(2, 10), "model").settings
    assert settings == LogitSettings(softcap, scale, VOCABULARY)


def test_scale_before_the_cap_is_measured() -> None:
    """c tanh(s x / c), as in Muse, is s c' tanh(x / c') with c' = c / s."""
    x = torch.logspace(-3, 4, 400)[None, None] * torch.tensor([1.0, -1.0]).repeat(200)
    config = transformers.LlamaConfig(output_multiplier=0.3, final_logit_softcapping=4.0)
    settings = fitted(x, 4.0 * torch.tanh(0.3 * x / 4.0), config)
    assert settings is not None
    assert (settings.softcap, settings.scale) == pytest.approx((4.0 / 0.3, 0.3), rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1,
        lambda x: x.clamp(-10, 10),
        lambda x: torch.where(x > 0, x, 0.5 * x),
        lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 7, -torch.inf),
        lambda x: torch.cat([2 * x[..., :9], x[..., 9:]], -1),
        lambda x: 0 * x,
    ],
)
def test_other_functions_are_not_taken_for_caps_and_scales(change: Any) -> None:
    x = torch.logspace(-3, 4, 400)[None, None] * torch.tensor([1.0, -1.0]).repeat(200)
    assert fitted(x, change(x), transformers.LlamaConfig()) is None


def test_unknown_function_is_refused_before_a_reference_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = {"pretrained": str(tiny_llama), "save_reference": str(tmp_path / "store"), "device": "cpu"}
    model = get_model("hf_quant")(**arguments)
    model._settings = None
    with pytest.raises(UserError, match="use reference_mode=logits"):
        model.score_checked(requests())
    assert not (tmp_path / "store").exists()


TEXT = {"model_type": "cohere2", **_TEXT, "logit_scale": 0.5, "head_dim": 32}
VISION = {"model_type": "siglip_vision_model", **_VISION}
IGNORED = {
    "AyaVision": ({"text_config": TEXT, "image_token_index": VOCABULARY - 1}, "logit_scale=0.5"),
    "Cohere2Vision": ({"text_config": TEXT, "image_token_id": VOCABULARY - 1}, "logit_scale=0.5"),
    "LlavaNext": (
        {
            "text_config": {"model_type": "granite", **_TEXT, "logits_scaling": 8.0},
            "image_token_index": VOCABULARY - 1,
        },
        "logits_scaling=8.0",
    ),
}


@pytest.mark.parametrize("wrapper", IGNORED)
def test_wrapper_that_ignores_its_text_models_scale_is_refused(
    wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, field = IGNORED[wrapper]
    kind = f"{wrapper}ForConditionalGeneration"
    one = Architecture(f"{wrapper}Config", fields | {"vision_config": VISION}, kind, plain=True)
    monkeypatch.setitem(ARCHITECTURES, "one", one)
    make_checkpoint("one", tmp_path)
    with pytest.raises(UserError, match=f"sets {field}, which {kind} .* never applies"):
        get_model("hf_quant")(pretrained=str(tmp_path), device="cpu", multimodal=True)


@pytest.mark.parametrize("config", ["HyperCLOVAXConfig", "MiniCPM3Config", "RecurrentGemmaConfig", "xLSTMConfig"])
def test_reference_holds_what_was_measured(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, softcap, scale = MODELS[config]
    monkeypatch.setitem(ARCHITECTURES, "one", Architecture(config, fields, plain=config == "xLSTMConfig"))
    make_checkpoint("one", tmp_path / "model")
    store = str(tmp_path / "store")
    model = get_model("hf_quant")(
        pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", save_reference=store
    )
    scores = model.score_checked(requests())
    manifest = ReferenceStore.open(store).manifest
    assert (manifest.softcap, manifest.scale) == (softcap, scale)
    assert max(np.abs((s.divergence or {})["kld"]).max() for s in scores) < 1e-6
