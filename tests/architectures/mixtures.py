"""Tiny random checkpoints for the kernels of a GPU, in the layouts of published ones, each with its decoded twin.

Sizes are those that vLLM's kernels on Hopper take: Marlin wants widths that are multiples of 64 and 128, FP8 has blocks
of 128, MXFP4 groups of 32, EXL3 multiples of 128; latent attention has DeepSeek's own sizes. Weights depend on names
and shapes alone, so every machine makes the same ones, whichever Transformers it has.

The twin holds, in float32, the weights that `lmeval_ext.decoding` reads from the quantized checkpoint. It knows nothing
of quantized activations.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmeval_ext.decoding import exl3, floats
from lmeval_ext.decoding.parts import Matrix
from tests.conftest import VOCABULARY, make_tokenizer

Tensors = dict[str, torch.Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
BLOCK = 128
# Inputs are around 1 in size, so that this number keeps their blocks' scales far from the ends of E4M3
INPUT_DIVISOR = 150.0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """config: class and fields. formats: as `quantize` names them. ignored: Linear layers that stay dense."""

    config: str
    fields: dict[str, Any]
    formats: tuple[str, ...]
    ignored: tuple[str, ...] = ()


FAMILIES = {
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True,
         "decoder_sparse_step": 1},
        ("NVFP4A16", "NVFP4", "FP8_DYNAMIC", "EXL3"),
        (r"re:.*mlp\.gate$",),
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_parameters": _YARN,
         "max_position_embeddings": 2048, **_TWO_KINDS},
        ("MXFP4",),
        ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"),
    ),
    # As NVIDIA's NVFP4 of DeepSeek: attention stays dense. In DeepSeek's own FP8 it does not.
    "deepseek-v3": Family(
        "DeepseekV3Config",
        {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 512, "q_lora_rank": 128,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8,
         "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
         "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.0, "norm_topk_prob": True, "num_hidden_layers": 3,
         "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ("NVFP4A16", "NVFP4", "FP8_BLOCK"),
        (r"re:.*self_attn.*", r"re:.*mlp\.gate$"),
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {"intermediate_size": 512, "query_pre_attn_scalar": 64, "tie_word_embeddings": True, **_TWO_KINDS},
        ("NVFP4A16", "NVFP4", "FP8_DYNAMIC"),
    ),
}  # fmt: skip


# ------------------------------------------------------------------ the unquantized model


def make_dense(folder: Path, family: str) -> Path:
    """Writes the unquantized checkpoint in bfloat16, and its tokenizer."""
    import transformers

    row = FAMILIES[family]
    config = getattr(transformers, row.config)(**(_COMMON | row.fields))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "rotary" not in name and tensor.is_floating_point() and "embed_scale" not in name:
                tensor.copy_(_random(name, tensor, family))
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    # As published checkpoints name it, and ExLlamaV3 reads it; Transformers 5 writes num_local_experts
    saved |= {name: value for name, value in row.fields.items() if name == "num_experts"}
    (folder / "config.json").write_text(json.dumps(saved))
    make_tokenizer(folder)
    return folder


def _random(name: str, like: torch.Tensor, family: str) -> torch.Tensor:
    """Values of a tensor, float32, by its name: of a size that keeps states near 1, and with logits that differ."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name:  # Gemma adds 1
        return values * 0.1 + (1.0 if family != "gemma3" else 7.0 if name == "model.norm.weight" else 0.0)
    if "embed_tokens" in name:  # Gemma ties the head: an input that outweighs the layers would predict itself
        return values * (0.3 / 16 if family == "gemma3" else 1.0)
    if like.ndim == 1:  # biases, and sinks
        return values * 0.1
    stacked_inputs = name.endswith(("experts.gate_up_proj", "experts.down_proj")) and family == "gpt-oss"
    inputs = like.shape[-2 if stacked_inputs else -1]
    # Experts that win clearly: rounding changes fewer choices
    size = 3.0 if name.endswith(("mlp.gate.weight", "router.weight")) else 2.5 if "lm_head" in name else 1.0
    return values * (size / inputs**0.5)


# ------------------------------------------------------------------ one matrix


def nvfp4(weight: torch.Tensor, absmax: float) -> Tensors:
    """A matrix [out, in] as compressed-tensors' NVFP4. absmax: of all matrices that share the second-level scale."""
    divisor = torch.tensor([E4M3_MAX * E2M1_MAX / absmax])
    blocks = weight.float().reshape(len(weight), -1, 16)
    scale = (blocks.abs().amax(-1) / E2M1_MAX * divisor).clamp(2**-9).to(torch.float8_e4m3fn)
    packed = _e2m1(blocks / (scale.float() / divisor).unsqueeze(-1)).reshape(len(weight), -1)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [..., in / 32, 16], exponents [..., in / 32]) of [..., in]: the exponent of the largest value, less 2."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor().clamp(-100) - 2
    return _e2m1(groups / torch.exp2(exponent).unsqueeze(-1)), (exponent + 127).to(torch.uint8)


def fp8_rows(weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / E4M3_MAX
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_blocks(weight: torch.Tensor) -> Tensors:
    rows, columns = (-(-n // BLOCK) for n in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: len(weight), : weight.shape[1]] = weight.float()
    scale = padded.reshape(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / E4M3_MAX
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: len(weight), : weight.shape[1]]
    return {"weight": (weight.float() / wide).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def exl3_random(weight: torch.Tensor, name: str) -> Tensors:
    """Random EXL3 at 4 bits, of the matrix's shape [out, in] and size alone: any bits are a valid trellis."""
    rows, columns = weight.shape
    bits = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    trellis = torch.randint(-(1 << 15), 1 << 15, (columns // 16, rows // 16, 64), generator=bits).to(torch.int16)
    signs = [(torch.randint(0, 2, (n,), generator=bits) * 2 - 1).float() for n in (columns, rows)]
    size = float(weight.float().std() / exl3.inner(trellis, "mul1").float().std())
    multiplier = torch.tensor(exl3.MULTIPLIERS["mul1"] - (1 << 32), dtype=torch.int32)
    return {"trellis": trellis, "suh": signs[0].half(), "svh": (signs[1] * size).half(), "mul1": multiplier}


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest values [..., n], two per byte [..., n / 2], the first in the low half."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
    code = torch.bucketize(values.abs().contiguous(), middles) | ((values < 0).long() << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)


# ------------------------------------------------------------------ the checkpoint


def quantize(source: Path, target: Path, family: str, scheme: str) -> Path:
    """Writes the quantized checkpoint and, beside it with the suffix -decoded, its twin; returns the twin."""
    state = load_file(source / "model.safetensors")
    packed, dense = (_gpt_oss if scheme == "MXFP4" else _matrices)(state, family, scheme)
    twin = target.with_name(target.name + "-decoded")
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, extra in ((target, packed, _quantization(family, scheme)), (twin, dense, {})):
        shutil.copytree(source, folder)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))
    return twin


def _matrices(state: Tensors, family: str, scheme: str) -> tuple[Tensors, Tensors]:
    packed, dense = dict(state), {name: tensor.float() for name, tensor in state.items()}
    for name, absmax in _quantized(state, family, scheme):
        base = name.removesuffix("weight")
        del packed[name]
        if scheme == "FP8_DYNAMIC":
            parts = fp8_rows(state[name])
        elif scheme == "FP8_BLOCK":
            parts = fp8_blocks(state[name])
        elif scheme == "EXL3":
            parts = exl3_random(state[name], name)
        else:
            parts = nvfp4(state[name], absmax)
        by_suffix = {f".{part}": tensor for part, tensor in parts.items()}
        decode = _DECODERS.get(scheme, floats.nvfp4)
        dense[name] = decode(by_suffix, torch.float32, Matrix(base, {"weight_block_size": [BLOCK, BLOCK]}))
        if scheme == "NVFP4":
            parts["input_global_scale"] = torch.tensor([INPUT_DIVISOR])
        packed |= {base + part: tensor for part, tensor in parts.items()}
    return packed, dense


_DECODERS: dict[str, Any] = {"FP8_DYNAMIC": floats.fp8, "FP8_BLOCK": floats.fp8, "EXL3": exl3.decode_parts}


def _quantized(state: Tensors, family: str, scheme: str) -> Iterator[tuple[str, float]]:
    """(name, absmax of all matrices that an engine runs as one) of each matrix that is quantized."""
    for name, tensor in state.items():
        kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
        if tensor.ndim != 2 or any(part in name for part in kept):
            continue
        if family == "deepseek-v3" and scheme != "FP8_BLOCK" and "self_attn" in name:
            continue
        group = [name]
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            part = name.split(".")[-2]
            if part in fused:
                group = [n for other in fused if (n := name.replace(part, other)) in state]
        yield name, max(float(state[n].abs().max()) for n in group)


def _gpt_oss(state: Tensors, family: str, scheme: str) -> tuple[Tensors, Tensors]:
    """Experts as OpenAI stores them: [experts, out, in / 32, 16]; Transformers' dense ones are [experts, in, out]."""
    packed, dense = dict(state), {name: tensor.float() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        del packed[name]
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales = mxfp4(tensor.transpose(1, 2))
        experts = [
            floats.mxfp4({".weight": b.flatten(1), ".weight_scale": s}, torch.float32, Matrix(name))
            for b, s in zip(blocks, scales, strict=True)
        ]
        dense[name] = torch.stack(experts).transpose(1, 2)
    return packed, dense


def _quantization(family: str, scheme: str) -> dict[str, Any]:
    ignored = list(FAMILIES[family].ignored)
    if scheme == "MXFP4":
        config: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": [*ignored, "lm_head"]}
    elif scheme == "EXL3":
        config = {"quant_method": "exl3", "version": "1.6.5", "bits": 4.0, "head_bits": 16, "codebook": "mul1"}
    elif scheme == "FP8_BLOCK":
        config = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    else:
        fp8 = scheme == "FP8_DYNAMIC"
        weights: dict[str, Any] = {
            "num_bits": 8 if fp8 else 4, "type": "float", "strategy": "channel" if fp8 else "tensor_group",
            "group_size": None if fp8 else 16, "symmetric": True, "dynamic": False,
        }  # fmt: skip
        inputs: dict[str, Any] | None = {**weights, "dynamic": True, "strategy": "token"}
        if not fp8:
            inputs = None if scheme == "NVFP4A16" else {**weights, "dynamic": "local"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        config = {
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head", *ignored],
            "format": "float-quantized" if fp8 else "nvfp4-pack-quantized", "config_groups": {"group_0": group},
        }  # fmt: skip
    return {"quantization_config": config}
