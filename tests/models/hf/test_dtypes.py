"""All dense weights have the dtype that the result names, whatever Transformers or a quantizer left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from lmeval_ext.models.hf.dtypes import FLOATS, main_dtype, other_dtypes, unify_dtype
from tests.architectures.checkpoints import ARCHITECTURES, logprobs, make_checkpoint, make_model, windows
from tests.models.hf.test_attention import requests
from tests.models.hf.test_mixtures import mixture

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "gemma3-wrapper", "deepseek-v3", "qwen3-next"])
def test_float32_is_float32_everywhere(name: str, tmp_path: Path) -> None:
    plain = make_checkpoint(name, tmp_path, "bfloat16")
    model = get_model("hf_quant")(
        pretrained=str(tmp_path), dtype="float32", device="cpu", multimodal=ARCHITECTURES[name].multimodal
    )
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    facts = model.describe()
    assert facts.dtype == "float32"
    assert not [note for note in facts.notes if note.startswith("not in")]
    for ids, scores in zip(windows(), model.score_windows(requests()), strict=True):
        np.testing.assert_allclose(scores.logprobs, plain(ids), atol=1e-4)


def mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Replaces the experts of a gpt-oss checkpoint by random MXFP4 codes; returns all tensors as the format means them.

    OCP MX specification 1.0: 32 values of E2M1 share a scale of E8M0; two values per byte, the low nibble first.
    """
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    random = torch.Generator().manual_seed(0)
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 3:
            stored[name], meant[name] = tensor, tensor.float()
            continue
        experts, rows, columns = tensor.shape
        codes = torch.randint(0, 256, (experts, columns, rows // 32, 16), generator=random, dtype=torch.uint8)
        exponents = torch.randint(121, 124, (experts, columns, rows // 32), generator=random, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        pairs = torch.stack([values[(codes & 15).long()], values[(codes >> 4).long()]], -1).flatten(-2)
        scaled = pairs * torch.exp2(exponents.float() - 127)[..., None]
        meant[name] = scaled.flatten(2).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def test_experts_that_transformers_decodes_are_float32_too(tmp_path: Path) -> None:
    """Transformers decodes MXFP4 to bfloat16, which rounds nothing, and would go on computing in it."""
    make_checkpoint("gpt-oss", tmp_path, "bfloat16")
    meant = mxfp4(tmp_path)
    plain = make_model(ARCHITECTURES["gpt-oss"])
    plain.load_state_dict(meant)
    model = get_model("hf_quant")(pretrained=str(tmp_path), dtype="float32", device="cpu")
    assert model.describe().dtype == "float32"
    for ids, scores in zip(windows(), model.score_windows(requests()), strict=True):
        np.testing.assert_allclose(scores.logprobs, logprobs(plain, ids), atol=1e-4)


def test_router_of_a_quantized_mixture_is_float32_too(tmp_path: Path) -> None:
    """Transformers renames it while it loads, and products of two dtypes fail."""
    from transformers import AutoModelForCausalLM

    folder = mixture(tmp_path / "mixture", "float-quantized", attention=False)
    dense = {
        name: tensor.bfloat16() if tensor.dtype == torch.float32 and "experts" not in name else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    twin = tmp_path / "mixture-twin"
    meant = load_file(twin / "model.safetensors")
    meant |= {name: tensor.float() for name, tensor in dense.items() if name in meant and "experts" not in name}
    save_file(meant, twin / "model.safetensors", metadata={"format": "pt"})
    model = get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu")
    floats = {p.dtype for p in model.model.parameters()}
    assert floats == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    for ids, scores in zip(windows(), model.score_windows(requests()), strict=True):
        np.testing.assert_allclose(scores.logprobs, logprobs(plain, ids), rtol=5e-3, atol=5e-3)


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


def test_note_names_weights_of_another_dtype(tmp_path: Path) -> None:
    make_checkpoint("qwen3-moe", tmp_path, "bfloat16")
    model = get_model("hf_quant")(pretrained=str(tmp_path), dtype="bfloat16", device="cpu")
    assert not [note for note in model.describe().notes if note.startswith("not in")]
    head = model.model.lm_head
    head.weight.data = head.weight.data.float()
    assert [n for n in model.describe().notes if n.startswith("not in")] == ["not in bfloat16: lm_head.weight"]


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
