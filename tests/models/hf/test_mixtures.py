"""Mixtures of experts in compressed-tensors, whose experts Transformers joins: FP8 it decodes, NVFP4 we do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from tests.conftest import VOCABULARY, make_tokenizer
from tests.models.hf.test_damaged_checkpoints import scores
from tests.models.test_adapters import windows

pytestmark = pytest.mark.engine
pytest.importorskip("compressed_tensors")

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP MX specification 1.0, table 5 (E2M1)
Tensors = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Float8 codes with a scale per output, and the weight that they mean."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP4 codes with a float8 scale per 16 inputs and one divisor of all scales, and the weight that they mean."""
    divisor = 448 * 6 / weight.abs().amax()
    groups = weight.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    steps = groups / (scale.float() / divisor)[..., None]
    index = (steps.abs()[..., None] - FP4).abs().argmin(-1)
    meant = (steps.sign() * FP4[index] * (scale.float() / divisor)[..., None]).flatten(1)
    nibbles = (index + 8 * (steps < 0)).flatten(1).to(torch.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor.reshape(1)}, meant


FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
SCHEMES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "float-quantized": (fp8, {
        "weights": FP8, "input_activations": {**FP8, "strategy": "token", "dynamic": True},
    }),
    "nvfp4-pack-quantized": (nvfp4, {
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
                    "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"},
    }),
}  # fmt: skip


def mixture(folder: Path, style: str, attention: bool) -> Path:
    """Writes a random Mixtral with quantized experts (and attention); its dense twin goes to FOLDER-twin."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    twin = folder.with_name(folder.name + "-twin")
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
            initializer_range=0.2,
        )
    )  # fmt: skip
    model.save_pretrained(twin)
    quantize, scheme = SCHEMES[style]
    tensors = load_file(twin / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(".weight")
        if ".experts." in name or (attention and "self_attn" in name):
            sides, meant = quantize(tensor)
            stored.update({f"{base}.{suffix}": side for suffix, side in sides.items()})
            tensors[name] = meant
        else:
            stored[name] = tensor
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(twin)
    folder.mkdir()
    for file in twin.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((twin / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": style, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$", *([] if attention else ["re:.*self_attn.*"])],
        "config_groups": {"group_0": {"targets": ["Linear"], "format": style, **scheme}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("style", SCHEMES)
def test_mixture_has_the_scores_of_its_dense_twin(style: str, attention: bool, tmp_path: Path) -> None:
    folder = mixture(tmp_path / "mixture", style, attention)
    right = scores(folder.with_name("mixture-twin"))
    model = get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu")
    found = np.array([s.logprobs for s in model._loglikelihood_tokens(windows(1, length=24, context=1))])
    model = get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu")
    found = np.array([s.logprobs for s in model._loglikelihood_tokens(windows(1, length=24, context=1))])
    if style == "nvfp4-pack-quantized":  # decoded by us: Transformers 5.19 and 5.24 have no use for experts' divisors
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
        assert model.get_model_info()["quantization"]["kernel"] == "decoded"
        return
    if attention and style == "float-quantized":  # whose activations are quantized
        assert 0.01 < np.abs(found - right).mean() < 0.3
    else:
        np.testing.assert_allclose(found, right, rtol=5e-3, atol=5e-3)
    notes = model.get_model_info()["quantization"]["notes"]
    assert len([note for note in notes if note.startswith("weight-only")]) == (style == "float-quantized")
