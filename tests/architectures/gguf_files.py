"""The tiny checkpoints as GGUF files in float32: one row of `ROWS` per model type.

A row says what llama.cpp's converter says of that architecture (conversion/*.py in the source of llama-cpp-python
0.3.36): llama.cpp's name for it, metadata beyond that of `FIELDS`, and the tensors that its graphs expect in another
form than Transformers stores them. Names of tensors come from gguf's own map.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.storage.builders import finish_gguf

Tensors = dict[str, np.ndarray]
Change = Callable[[str, np.ndarray, Any], Iterable[tuple[str, np.ndarray]]]

# Metadata, and the fields of config.json that it comes from; the first that is there counts
FIELDS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "vocab_size": ("vocab_size",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "logit_scale": ("logit_scale", "logits_scaling"),
}


@dataclass(frozen=True)
class Row:
    """One model type. arch: llama.cpp's name. keys: more metadata, from the config; None leaves a key out.

    change: what becomes of a tensor, from its name and values and the config.
    """

    arch: MODEL_ARCH
    keys: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    change: Change = lambda name, values, config: [(name, values)]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# ------------------------------------------------------------------ tensors


def rotated(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Rows of queries and keys where llama.cpp rotates neighbours, and Transformers the halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads:
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return [(name, values)]


def plus_one(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Norms that Transformers stores less one."""
    return [(name, values + 1 if name.endswith("norm.weight") else values)]


def transposed(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """GPT-2 keeps matrices as [in, out]."""
    matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return [(name, values.T if matrix else values)]


def interleaved_experts(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """gpt-oss: [experts, in, out], and the gate and up projections alternate."""
    if name.endswith("sinks"):
        return [(f"{name}.weight", values)]
    match = re.fullmatch(r"(.*experts\.)(gate_up_proj|down_proj)(_bias)?", name)
    if not match:
        return [(name, values)]
    suffix = ".bias" if match[3] else ".weight"
    values = values if match[3] else values.swapaxes(1, 2)
    if match[2] == "down_proj":
        return [(f"{match[1]}down_proj{suffix}", values)]
    return [(f"{match[1]}{part}_proj{suffix}", values[:, start::2]) for start, part in enumerate(("gate", "up"))]


def latent_halves(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """DeepSeek: the expansion of the latent as one matrix for keys (transposed) and one for values, per head."""
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), values)]
    if not name.endswith("kv_b_proj.weight"):
        return [(name, values)]
    parts = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, of_values = np.split(parts, [config.qk_nope_head_dim], axis=1)
    return [(name.replace("kv_b", "k_b"), keys.swapaxes(1, 2)), (name.replace("kv_b", "v_b"), of_values)]


def mamba(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """A as such instead of its logarithm; kernels of the convolution without the empty dimension."""
    if name.endswith("A_log"):
        values = -np.exp(values)
    if name.endswith("conv1d.weight"):
        values = values.squeeze()
    if name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    return [(name, values)]


def falcon_h1(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """The config's multipliers become part of the matrices."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    inner, groups = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    attention = config.attention_in_multiplier
    factors: dict[str, Any] = {
        "down_proj": config.mlp_multipliers[1], "gate_proj": config.mlp_multipliers[0],
        "q_proj": attention, "k_proj": attention * config.key_multiplier, "v_proj": attention,
        "o_proj": config.attention_out_multiplier, "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier, "embed_tokens": config.embedding_multiplier,
    }  # fmt: skip
    if module == "in_proj":  # gate, input, B, C, dt
        sizes = [inner, inner, groups, groups, config.mamba_n_heads]
        factors[module] = config.ssm_in_multiplier * np.repeat(config.ssm_multipliers, sizes)[:, None]
    ((name, values),) = mamba(name, values * factors.get(module, 1.0), config)
    if module in ("A_log", "D"):
        values = values[:, None]
    if name.endswith("mamba.norm.weight"):
        values = values.reshape(config.mamba_n_groups, -1)
    return [(name, values)]


def jamba(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    return mamba(name.replace("feed_forward.experts.", "mlp.experts."), values, config)


def delta_net(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Qwen3-Next: each key head has its part of queries, keys, values and gates; llama.cpp wants them apart."""
    ((name, values),) = mamba(name, values, config)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        values = values + 1
    if not name.endswith("in_proj_qkvz.weight"):
        return [(name, values)]
    keys, heads = config.linear_key_head_dim, config.linear_num_key_heads
    of_values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    parts = np.split(values.reshape(heads, -1, values.shape[-1]), np.cumsum([keys, keys, of_values]), axis=1)
    q, k, v, z = (part.reshape(-1, values.shape[-1]) for part in parts)
    return [(name.replace("qkvz", "qkv"), np.concatenate([q, k, v])), (name.replace("qkvz", "z"), z)]


def tiled_delta_net(name: str, values: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Qwen3.5: value heads in the order in which llama.cpp repeats the key heads."""
    ((name, values),) = delta_net(name, values, config)
    keys, heads, dim = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    order = np.arange(heads).reshape(keys, -1).T.ravel()
    elements = (order[:, None] * dim + np.arange(dim)).ravel()
    before = 2 * keys * config.linear_key_head_dim  # queries and keys
    behind = np.concatenate([np.arange(before), before + elements])
    for ending, rows in (
        ("in_proj_qkv.weight", behind), ("conv1d.weight", behind), ("in_proj_z.weight", elements),
        ("in_proj_a.weight", order), ("in_proj_b.weight", order), ("A_log", order), ("dt_proj.bias", order),
    ):  # fmt: skip
        if name.endswith(f"linear_attn.{ending}"):
            values = values[rows]
    if name.endswith("linear_attn.out_proj.weight"):
        values = values[:, elements]
    return [(name, values)]


# ------------------------------------------------------------------ metadata


def granite_keys(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention.scale": config.attention_multiplier,
    }


def latent_keys(config: Any) -> dict[str, Any]:
    """Latent attention is attention of one KV head to llama.cpp."""
    latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1, "attention.q_lora_rank": config.q_lora_rank, "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotary, "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + rotary, "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rotary, "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
    }  # fmt: skip


def mamba_keys(config: Any) -> dict[str, Any]:
    """Sizes of the Mamba part of a hybrid."""
    return {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.inner_size": getattr(config, "mamba_d_ssm", None) or config.mamba_expand * config.hidden_size,
        "ssm.time_step_rank": getattr(config, "mamba_n_heads", None) or config.mamba_dt_rank,
        "ssm.group_count": getattr(config, "mamba_n_groups", None),
    }


def jamba_keys(config: Any) -> dict[str, Any]:
    attends = [n % config.attn_layer_period == config.attn_layer_offset for n in range(config.num_hidden_layers)]
    return mamba_keys(config) | {"attention.head_count_kv": [config.num_key_value_heads * flag for flag in attends]}


def delta_net_keys(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
    }


def sections(config: Any) -> dict[str, Any]:
    """Dimensions that follow time, height and width of pictures."""
    stated = config.rope_parameters.get("mrope_section", [11, 11, 10])
    return {"rope.dimension_sections": [*stated, 0][:4]}


def window_period(config: Any) -> dict[str, Any]:
    """Of `period` layers, the last one attends to everything."""
    kinds = config.layer_types
    return {"attention.sliding_window_pattern": kinds.index("full_attention") + 1}


ROWS: dict[str, Row] = {
    "llama": Row(MODEL_ARCH.LLAMA, change=rotated),
    "mixtral": Row(MODEL_ARCH.LLAMA, change=rotated),
    "smollm3": Row(MODEL_ARCH.SMOLLM3, change=rotated),
    "granite": Row(MODEL_ARCH.GRANITE, granite_keys, rotated),
    "qwen3": Row(MODEL_ARCH.QWEN3),
    "qwen3_moe": Row(MODEL_ARCH.QWEN3MOE),
    "qwen3_next": Row(MODEL_ARCH.QWEN3NEXT, delta_net_keys, delta_net),
    "qwen3_5_text": Row(MODEL_ARCH.QWEN35, lambda c: delta_net_keys(c) | sections(c), tiled_delta_net),
    "qwen2_5_vl_text": Row(MODEL_ARCH.QWEN2VL, sections),
    "gemma2": Row(MODEL_ARCH.GEMMA2, change=plus_one),
    "gemma3_text": Row(MODEL_ARCH.GEMMA3, window_period, plus_one),
    "phi": Row(MODEL_ARCH.PHI2),
    "phi3": Row(MODEL_ARCH.PHI3),
    "cohere": Row(MODEL_ARCH.COMMAND_R),
    "cohere2": Row(MODEL_ARCH.COHERE2, window_period),
    "olmo2": Row(MODEL_ARCH.OLMO2),
    "starcoder2": Row(MODEL_ARCH.STARCODER2),
    "gpt2": Row(MODEL_ARCH.GPT2, lambda c: {"feed_forward_length": 4 * c.hidden_size}, transposed),
    "gpt_oss": Row(
        MODEL_ARCH.GPT_OSS, lambda c: {"expert_feed_forward_length": c.intermediate_size}, interleaved_experts
    ),
    "deepseek_v3": Row(MODEL_ARCH.DEEPSEEK2, latent_keys, latent_halves),
    "falcon_h1": Row(MODEL_ARCH.FALCON_H1, mamba_keys, falcon_h1),
    "jamba": Row(MODEL_ARCH.JAMBA, jamba_keys, jamba),
}


# ------------------------------------------------------------------ rotary positions


def rotary(config: Any) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of rotary positions."""
    every = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    if not rope:
        return {}, {}
    kind, dimensions = rope.get("rope_type", "default"), int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    keys = {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": dimensions}
    if "sliding_attention" in every:
        keys["rope.freq_base_swa"] = every["sliding_attention"]["rope_theta"]
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn":
        return keys | {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"), "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"] if "mscale_all_dim" in rope else None,
        }, {}  # fmt: skip
    if kind == "longrope":
        scale = config.max_position_embeddings / original
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
        return keys, {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"]) for name in ("short", "long")}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": llama3_factors(rope, dimensions)}
    assert kind == "default", f"llama.cpp has no {kind} scaling"
    return keys, {}


def llama3_factors(rope: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """By what llama.cpp divides each frequency: 1 for short waves, `factor` for long ones, and between."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dimensions, 2) / dimensions)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / rope["factor"] + share)


# ------------------------------------------------------------------ the file


def stored_tensors(folder: Path) -> Tensors:
    """The language model's tensors of a checkpoint by the names of a text model; experts are joined."""
    from safetensors.numpy import load_file

    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    names = {name: re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name) for name in tensors}
    text = {
        renamed.replace("model.lm_head", "lm_head"): tensors[name]
        for name, renamed in names.items()
        if not re.search(r"visual|vision|multi_modal", name)
    }
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name in list(text):
        if match := re.fullmatch(r"(.*experts\.)(\d+)\.(.*)", name):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = text.pop(name)
    return text | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def gguf_tensors(tensors: Tensors, row: Row, config: Any) -> Tensors:
    """Tensors under llama.cpp's names. Fails for one that the architecture does not have."""
    names = gguf.get_tensor_name_map(row.arch, config.num_hidden_layers)
    converted: Tensors = {}
    for name, values in tensors.items():
        if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        for changed, array in row.change(name, values, config):
            target = names.get_name(changed, try_suffixes=(".weight", ".bias"))
            assert target is not None, f"{row.arch.name} has no {changed}"
            converted[target] = array
    return converted


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata of the type of a Python value."""
    kind = gguf.GGUFValueType
    types = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING, list: kind.ARRAY}
    writer.add_key_value(key, value, types[type(value)])


def write_gguf(folder: Path, path: Path, **changes: Any) -> Path:
    """Writes the text model of a checkpoint as a GGUF file. changes: of the config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    for name, value in changes.items():
        setattr(config, name, value)
    row = ROWS[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[row.arch])
    keys: dict[str, Any] = {
        key: next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        for key, names in FIELDS.items()
    }
    if config.model_type != "gpt2":
        keys |= {f"attention.{kind}_length": head_dim(config) for kind in ("key", "value")}
    metadata, factors = rotary(config)
    for key, value in (keys | metadata | dict(row.keys(config))).items():
        if value is not None:
            add(writer, f"{writer.arch}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_vocabulary(writer, folder, config.vocab_size)
    for name, values in (gguf_tensors(stored_tensors(folder), row, config) | factors).items():
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    finish_gguf(writer)
    return path


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Writes the checkpoint's byte-level tokenizer; rows of the embedding beyond it are padding."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.UNUSED] * size
    texts = [f"[PAD{index}]" for index in range(size)]
    for text, index in (vocabulary | special).items():
        texts[index] = text
        kinds[index] = gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(special["<s>"])
    writer.add_eos_token_id(special["</s>"])
    writer.add_add_bos_token(False)
