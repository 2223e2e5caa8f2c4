"""All dense weights have the dtype that the result names, whatever Transformers or a quantizer left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model

from lmeval_ext.models.hf.dtypes import FLOATS, main_dtype, other_dtypes, unify_dtype
from tests.architectures.checkpoints import ARCHITECTURES, make_checkpoint, windows
from tests.models.hf.test_attention import requests

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "gemma3-wrapper", "deepseek-v3", "qwen3-next"])
def test_float32_is_float32_everywhere(name: str, tmp_path: Path) -> None:
    plain = make_checkpoint(name, tmp_path, "bfloat16")
    model = get_model("hf_quant")(
        pretrained=str(tmp_path), dtype="float32", device="cpu", multimodal=ARCHITECTURES[name].multimodal
    )
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert model.describe().dtype == "float32"
    for ids, scores in zip(windows(), model.score_windows(requests()), strict=True):
        np.testing.assert_allclose(scores.logprobs, plain(ids), atol=1e-4)


class Layer(torch.nn.Module):
    """A weight in one dtype; with codes, as a quantized layer has them."""

    def __init__(self, dtype: torch.dtype, packed: bool = False) -> None:
        super().__init__()
        if packed:
            self.weight_packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
            self.weight_scale = torch.nn.Parameter(torch.ones(4, 1, dtype=dtype))
        else:
            self.weight = torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Model(torch.nn.Module):
    _keep_in_fp32_modules = ("router",)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.experts = Layer(torch.float32), Layer(torch.bfloat16)
        self.packed, self.router = Layer(torch.bfloat16, packed=True), Layer(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_narrow_weights_are_widened_and_scales_of_packed_ones_are_not() -> None:
    model = Model()
    assert main_dtype(model) == torch.float32
    unify_dtype(model, torch.float32)
    assert model.experts.weight.dtype == torch.float32
    assert model.packed.weight_scale.dtype == torch.bfloat16
    assert other_dtypes(model, torch.float32) == []


def test_weights_that_appear_at_the_first_forward_are_widened() -> None:
    model = Model()
    unify_dtype(model, torch.float32)
    model.layer.weight.data = model.layer.weight.data.bfloat16()  # as compressed-tensors decodes FP4
    model(torch.zeros(1))
    assert model.layer.weight.dtype == torch.float32


def test_wider_weights_are_kept_and_named() -> None:
    model = Model()
    unify_dtype(model, torch.bfloat16)
    assert model.layer.weight.dtype == torch.float32  # casting would round it
    assert other_dtypes(model, torch.bfloat16) == ["layer.weight"]  # the router is meant to be float32
    assert torch.bfloat16 in FLOATS
