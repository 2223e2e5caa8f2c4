"""Architectures that vLLM's CPU build gets wrong or crashes on by itself: equal to a plain Transformers forward."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from lmeval_ext.errors import UserError
from lmeval_ext.requests import window_request
from tests.conftest import evaluate
from tests.models.vllm.tiny_models import make_model, plain_logprobs, random_windows

pytestmark = pytest.mark.engine

SMALL = {"dtype": "float32", "max_model_len": 200, "kv_cache_memory_bytes": 1 << 28}


@pytest.mark.parametrize("name", ["latent", "mamba2"])
def test_scores_equal_a_plain_forward(name: str, tmp_path: Path) -> None:
    """Latent attention: 3-D queries in the rotary kernel. Mamba-2: prefix caching is off, which is an IndexError."""
    folder = make_model(tmp_path / name, name)
    windows = random_windows(150, 40, 90)
    expected = plain_logprobs(folder, windows)
    model = get_model("vllm_nvfp4")(pretrained=str(folder), **SMALL)
    assert model.model_args.get("enable_prefix_caching") is (False if name == "mamba2" else None)
    requests = [window_request("w", ids, 1, {}, (None, None, None)) for ids in windows]
    for scores, logprobs in zip(model._loglikelihood_tokens(requests), expected, strict=True):
        np.testing.assert_allclose(scores.logprobs, logprobs, atol=1e-4)
    del model
    gc.collect()


def test_reference_of_a_head_narrower_than_the_model(tmp_path: Path) -> None:
    """OPT-350m projects its states before the head; a product with the model's width is a segmentation fault."""
    folder, store = make_model(tmp_path / "opt", "narrow_head"), str(tmp_path / "store")
    text = {"eval_len": 64, "stride": 64}
    saved = evaluate("vllm_nvfp4", "sample_strided", 1, text, pretrained=str(folder), save_reference=store, **SMALL)
    gc.collect()
    measured = evaluate("vllm_nvfp4", "sample_strided", 1, text, pretrained=str(folder), reference=store, **SMALL)
    gc.collect()
    results = measured["results"]["sample_strided"]
    assert results["kld,none"] == pytest.approx(0, abs=1e-6)
    assert results["token_perplexity,none"] == saved["results"]["sample_strided"]["token_perplexity,none"]


# ------------------------------------------------------------------ rotary embeddings on a CPU


def test_rotary_embedding_of_3d_queries_equals_vllms_native_code() -> None:
    """vLLM 0.32's kernel rotates the first head alone; callers use what is returned, or what is written in place."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from lmeval_ext.models.vllm import cpu_rotary

    cpu_rotary.register()
    cpu_rotary.register()  # idempotent
    assert cpu_rotary.is_right()
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    yarn = {**parameters, "rope_type": "deepseek_yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        for rope_parameters in (parameters, yarn):
            for neox in (True, False):
                rope = get_rope(64, max_position=128, rope_parameters=rope_parameters, is_neox_style=neox).float()
                positions, query, key = torch.arange(5), torch.randn(5, 4, 192)[..., 128:], torch.randn(5, 1, 64)
                expected = rope.forward_native(positions, query.clone(), key.clone())
                got = rope.forward_cpu(positions, query, key)
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b)
                if rope_parameters is parameters:  # yarn's class has no kernel on a CPU
                    torch.testing.assert_close((query, key), expected)


def test_latent_attention_is_refused_where_the_repair_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from lmeval_ext.models.vllm import cpu_rotary

    cpu_rotary.register()
    folder = make_model(tmp_path / "latent", "latent")
    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_cpu.__wrapped__)
    monkeypatch.setattr(cpu_rotary, "register", lambda: None)  # vLLM loads its plugins again
    assert not cpu_rotary.is_right()
    with pytest.raises(UserError, match="may rotate multi-head latent attention wrongly"):
        get_model("vllm_nvfp4")(pretrained=str(folder), **SMALL)


def test_user_decides_about_prefix_caching_of_a_hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models import vllm_causallms

    given: list[Any] = []

    def engine(**arguments: Any) -> Any:
        given.append(arguments["enable_prefix_caching"])
        raise RuntimeError("enough")

    monkeypatch.setattr(vllm_causallms, "LLM", engine)
    folder = make_model(tmp_path / "mamba2", "mamba2")
    for arguments, expected in (({}, False), ({"enable_prefix_caching": True}, True)):
        with pytest.raises(UserError, match="enough"):
            get_model("vllm_nvfp4")(pretrained=str(folder), **SMALL, **arguments)
        assert given.pop() is expected


# ------------------------------------------------------------------ NVFP4 experts on a CPU


def fp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of compressed-tensors' NVFP4, what they mean): a value is e2m1 × e4m3 block scale ÷ global scale."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = weight.reshape(len(weight), -1, 16)
    divisor = 448 * 6 / weight.abs().max()
    scale = (blocks.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    step = (scale.float() / divisor).unsqueeze(-1)
    code = ((blocks / step).abs().unsqueeze(-1) - magnitudes).abs().argmin(-1)
    meant = (magnitudes[code] * blocks.sign() * step).reshape(weight.shape)
    nibbles = (code | ((blocks < 0).long() << 3)).reshape(len(weight), -1, 2).to(torch.uint8)
    packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor.reshape(1)}, meant


def quantize_experts(source: Path, target: Path, input_divisor: float | None) -> Path:
    """Writes a copy whose experts are NVFP4; returns a second one with the weights that these mean."""
    decoded = target.with_name(target.name + "-decoded")
    tensors = load_file(source / "model.safetensors")
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            packed[name] = plain[name] = tensor
            continue
        parts, plain[name] = fp4(tensor)
        stem = name.removesuffix("weight")
        if input_divisor is not None:
            parts["input_global_scale"] = torch.tensor([input_divisor])
        packed |= {stem + part: value for part, value in parts.items()}
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
               "dynamic": False}  # fmt: skip
    inputs = None if input_divisor is None else {**weights, "dynamic": "local"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"], "config_groups": {"group_0": group},
    }  # fmt: skip
    for folder, state, extra in ((target, packed, {"quantization_config": quantization}), (decoded, plain, {})):
        shutil.copytree(source, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | extra))
    return decoded


@pytest.mark.parametrize("input_divisor", [None, 40.0], ids=["A16", "W4A4"])
def test_nvfp4_experts_equal_their_decoded_twin(tmp_path: Path, input_divisor: float | None) -> None:
    """Weight-only experts are exactly the decoded weights; with activations they are not, and the result says why."""
    source = make_model(tmp_path / "dense", "experts")
    decoded = quantize_experts(source, tmp_path / "nvfp4", input_divisor)
    windows = random_windows(60, 40)
    expected = plain_logprobs(decoded, windows)
    model = get_model("vllm_nvfp4")(pretrained=str(tmp_path / "nvfp4"), **SMALL)
    requests = [window_request("w", ids, 1, {}, (None, None, None)) for ids in windows]
    scores = model._loglikelihood_tokens(requests)
    worst = max(float(np.abs(s.logprobs - e).max()) for s, e in zip(scores, expected, strict=True))
    facts = model.describe()
    assert facts.kernel == "reference experts"
    if input_divisor is None:
        assert worst < 1e-4
        assert not any("activations" in note for note in facts.notes)
    else:
        assert 1e-3 < worst < 3
        assert "activations quantized by reference experts, emulated" in facts.notes
    del model
    gc.collect()


def test_emulated_experts_by_hand() -> None:
    """Two tokens, two experts with scales of their own; inputs go through FP4 as compressed-tensors quantizes them."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from lmeval_ext.models.vllm.cpu_experts import EmulatedExperts

    torch.manual_seed(0)
    w13, w2, x = torch.randn(2, 64, 32) / 4, torch.randn(2, 32, 32) / 4, torch.randn(3, 32)
    a13, a2 = torch.tensor([300.0, 500.0]), torch.tensor([90.0, 110.0])
    ids, weights = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]])
    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations

    def quantized(values: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        factor = divisor.reshape(1)
        scale, zero = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Linear(32, 8), global_scale=factor)
        return fake_quantize(x=values, scale=scale, zero_point=zero, args=arguments, global_scale=factor)

    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    expected = torch.zeros(3, 32)
    for token in range(3):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            hidden = gated(quantized(x[token : token + 1], a13[expert]) @ w13[expert].T)
            expected[token] += weight * (quantized(hidden, a2[expert]) @ w2[expert].T)[0]
    got = EmulatedExperts(w13, w2, a13, a2)(x, weights, ids, gated, False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
