"""Logits from hidden states, compared with float64 by hand and with Transformers' models that scale or cap them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmeval_ext.divergence import head as module
from lmeval_ext.divergence.head import OutputHead, logit_settings
from lmeval_ext.models.hf.scoring import captured_states
from tests.divergence.stores import random

WIDTH, VOCABULARY = 48, 301


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def by_hand(head: OutputHead, hidden: torch.Tensor) -> np.ndarray:
    """The formula of the class' docstring in float64."""
    logits = hidden.double().numpy() @ head.weight.double().numpy().T
    if head.bias is not None:
        logits = logits + head.bias.double().numpy()
    if head.softcap:
        logits = head.softcap * np.tanh(logits / head.softcap)
    return np.asarray(head.scale * logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"softcap": 5.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 3.0}])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_equal_the_formula_in_float64(dtype: torch.dtype, settings: dict[str, float], biased: bool) -> None:
    weight, hidden = random(VOCABULARY, WIDTH).to(dtype), random(9, WIDTH, seed=1).to(dtype)
    bias = random(VOCABULARY, seed=2).to(dtype) if biased else None
    head = OutputHead(weight, bias, **settings)
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits, by_hand(head, hidden), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(head.logits(hidden), logits)  # a second call gives the same


def test_hidden_states_are_not_rounded_to_the_dtype_of_the_weights() -> None:
    """With a float32 engine and a 16-bit output matrix, products are formed in float32."""
    head, hidden = OutputHead(random(VOCABULARY, WIDTH).bfloat16()), random(9, WIDTH, seed=1)
    np.testing.assert_allclose(head.logits(hidden), by_hand(head, hidden), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("part", [1, 64, 301, 1000])
def test_large_matrix_is_converted_in_parts_without_a_copy(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_BYTES", 0)
    monkeypatch.setattr(module, "_PART_ROWS", part)
    head, hidden = OutputHead(random(VOCABULARY, WIDTH).bfloat16(), softcap=4.0), random(9, WIDTH, seed=1)
    np.testing.assert_allclose(head.logits(hidden), by_hand(head, hidden), rtol=1e-5, atol=1e-4)
    assert getattr(head, "_copy", None) is None


@pytest.mark.parametrize("copy", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_summed_in_float32(copy: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds with a CPU's matrix units, which take bfloat16 only and would round float16 and float32."""
    monkeypatch.setattr(module, "_COPY_BYTES", copy)
    weight, hidden = random(3000, 768).to(dtype), random(64, 768, seed=1).to(dtype)
    exact = hidden.double() @ weight.double().t()
    assert (OutputHead(weight).logits(hidden).double() - exact).abs().max() < 2e-4
    assert (exact.bfloat16().double() - exact).abs().max() > 0.1
    assert (hidden.bfloat16().double() @ weight.bfloat16().double().t() - exact).abs().max() > 0.01 or (
        dtype == torch.bfloat16
    )


@pytest.mark.parametrize("copy", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_precision_of_the_program_changes_nothing(
    copy: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "medium" allows PyTorch to form float32 products from bfloat16 ones, which it does on CPUs that can."""
    monkeypatch.setattr(module, "_COPY_BYTES", copy)
    head, hidden = OutputHead(random(256, 256).to(dtype)), random(64, 256, seed=1)
    exact = head.logits(hidden)
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(OutputHead(head.weight).logits(hidden), exact)
    assert torch.get_float32_matmul_precision() == "medium"  # left as it was


def test_matmul_precision_is_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError):
        OutputHead(random(VOCABULARY, WIDTH)).logits(random(2, WIDTH + 1))
    assert torch.get_float32_matmul_precision() == "high"


# ---------------------------------------------------------------------- softcaps and scales of models

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaConfig", {}, (None, 1.0)),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0}, (3.0, 1.0)),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, (None, 0.0625)),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25}, (None, 0.25)),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}, (None, 0.125)),
    "granitemoe": (
        "GraniteMoeConfig",
        {"logits_scaling": 6.0, "num_local_experts": 2, "num_experts_per_tok": 1},
        (None, 1 / 6),
    ),
    "phi": ("PhiConfig", {}, (None, 1.0)),  # its output matrix has a bias
    "falcon_h1": (
        "FalconH1Config",
        {"lm_head_multiplier": 0.5, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_ssm": 96},
        (None, 0.5),
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_models(name: str) -> None:
    """The input of the output matrix and the config are enough to compute the model's own logits."""
    kind, more, expected = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SMALL | more))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = model.get_output_embeddings()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    assert logit_settings(config) == pytest.approx(expected) if expected[0] else logit_settings(config)[0] is None
    assert logit_settings(config)[1] == pytest.approx(expected[1])
    assert logit_settings(config.to_dict()) == logit_settings(config)
    head = OutputHead(layer.weight.data, None if layer.bias is None else layer.bias.data, *logit_settings(config))
    with torch.no_grad(), captured_states(model) as states:
        expected_logits = model(torch.arange(2, 22)[None]).logits[0]
    logits = head.logits(states[-1][0])
    assert expected_logits.std() > 0.05
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)
    if expected != (None, 1.0):  # without the settings the logits differ
        assert not np.allclose(OutputHead(head.weight, head.bias).logits(states[-1][0]), expected_logits, rtol=0.05)


def test_settings_of_configs_without_any_are_neutral() -> None:
    assert logit_settings({}) == (None, 1.0)
    assert logit_settings({"final_logit_softcapping": None, "logit_scale": "inv_sqrt_d_model"}) == (None, 1.0)
