"""Bytes per token in the KV cache: by hand for known models, and measured on a real cache."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from lmeval_ext.storage.kv_cache import kv_cache
from tests.storage.builders import dense, finish_gguf, write_checkpoint

LLAMA_31_8B = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
               "num_key_value_heads": 8, "max_position_embeddings": 131072, "torch_dtype": "bfloat16"}  # fmt: skip


def folder_with(path: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 131_072),  # 32 layers × 8 heads × 128 × (K and V) × 2 bytes: 128 KiB, 1 GiB at 8,192 tokens
        ({"num_key_value_heads": None}, 524_288),  # one per attention head, as in Llama 2 7B
        ({"head_dim": 64}, 65_536),
        ({"torch_dtype": "float32"}, 262_144),
        ({"torch_dtype": None, "dtype": "float16"}, 131_072),
        # Qwen2.5-7B: 28 × 4 × 128 × 2 × 2; its window of 131,072 is switched off
        ({"model_type": "qwen2", "num_hidden_layers": 28, "num_key_value_heads": 4, "hidden_size": 3584,
          "num_attention_heads": 28, "sliding_window": 131072, "use_sliding_window": False}, 57_344),
        # Qwen3-8B: 36 × 8 × 128 × 2 × 2, head_dim is not hidden_size / heads in every size
        ({"model_type": "qwen3", "num_hidden_layers": 36, "head_dim": 128}, 147_456),
        ({"model_type": "mistral", "sliding_window": None}, 131_072),
    ],
)  # fmt: skip
def test_known_model_matches_figure_by_hand(tmp_path, changes, expected):
    cache = kv_cache(folder_with(tmp_path / "m", **LLAMA_31_8B | changes))
    assert cache.bytes_per_token == expected
    assert cache.note is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"sliding_window": "4096", "model_type": "mistral"}, "sliding_window"),
        ({"torch_dtype": None}, "dtype"),
        ({"torch_dtype": "float9"}, "float9"),
        ({"model_type": "internlm2", "num_attention_heads": None}, "num_attention_heads"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 32}, "num_kv_shared_layers"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "kinds of layers"),
        ({"model_type": "nemotron_h", "layer_types": ["attention"] * 31}, "31 layers of 32"),
        # A state whose size is not in our table may exceed keys and values, so there is no upper bound
        ({"layer_types": ["full_attention", "linear_attention"] * 16, "linear_num_value_heads": 4}, "linear_num"),
        ({"model_type": "new", "mamba_d_state": 16}, "'new' models"),
        ({"model_type": "new", "is_encoder_decoder": True}, "'new' models"),
    ],
)
def test_unknown_cache_gives_null_and_the_reason(tmp_path, changes, reason):
    cache = kv_cache(folder_with(tmp_path / "m", **LLAMA_31_8B | changes))
    assert cache.groups is cache.bytes_per_token is cache.bytes_at(10) is cache.to_dict() is None
    assert cache.dtype is None
    assert reason in cache.note


@pytest.mark.parametrize(
    ("changes", "bytes_per_token", "reason"),
    [
        ({"model_type": "new"}, 131_072, "'new' models"),
        # A latent in a family that has none: 32 heads of 192 (128 + 64) elements, keys and values
        ({"model_type": "new", "kv_lora_rank": 512, "num_key_value_heads": 32, "qk_nope_head_dim": 128,
          "qk_rope_head_dim": 64}, 32 * 32 * 192 * 2 * 2, "'new' models"),
        ({"kv_lora_rank": 512}, 131_072, "kv_lora_rank"),
        ({"use_cla": True}, 131_072, "use_cla"),
        ({"layer_types": ["full_attention", "telepathy"] * 16}, 131_072, "telepathy"),
        # The largest of what layers of other kinds name: 16 heads of 256
        ({"model_type": "new", "swa_num_key_value_heads": 16, "global_head_dim": 256}, 32 * 16 * 256 * 4, "'new'"),
        ({"model_type": "new", "per_layer_config": {"3": {"head_dim": 512}}}, 32 * 8 * 512 * 4, "'new'"),
        ({"model_type": "new", "num_key_value_heads": None}, 32 * 32 * 128 * 4, "'new'"),
    ],
)  # fmt: skip
def test_model_without_a_row_gets_an_upper_bound(tmp_path, changes, bytes_per_token, reason):
    cache = kv_cache(folder_with(tmp_path / "m", **LLAMA_31_8B | changes))
    assert cache.bytes_per_token is None, "an upper bound is not the figure"
    assert (cache.exact, cache.to_dict()["upper_bound"]) == (False, True)
    assert cache.bytes_at(1000) == 1000 * bytes_per_token
    assert "upper bound" in cache.note
    assert reason in cache.note


# Configs as published (fields that their classes have anyway left out), and what a bfloat16 cache takes: bytes per
# token and window of the layers that share one, and bytes of states (convolutions in bfloat16, recurrent in float32).
ARCHITECTURES = {
    "Mistral 7B": ({"model_type": "mistral", "num_hidden_layers": 32, "sliding_window": 4096},
                   [(32 * 2 * 8 * 128 * 2, 4096)], 0),
    "Pixtral": ({"model_type": "llava", "text_config": {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128,
                 "num_key_value_heads": 8, "num_hidden_layers": 40, "sliding_window": None}}, [(163_840, None)], 0),
    "Qwen2.5-VL 7B": ({"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_attention_heads": 28,
                       "num_key_value_heads": 4, "num_hidden_layers": 28, "use_sliding_window": False,
                       "sliding_window": 32768, "max_window_layers": 28}, [(57_344, None)], 0),
    "Qwen3-VL 8B": ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text", "head_dim": 128,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36}},
                    [(147_456, None)], 0),
    "Qwen3-VL 30B": ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "head_dim": 128,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48}},
                     [(98_304, None)], 0),
    "GLM-4.5-Air": ({"model_type": "glm4_moe", "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
                     "num_hidden_layers": 46, "num_nextn_predict_layers": 1}, [(188_416, None)], 0),
    "MiniMax-M2": ({"model_type": "minimax_m2", "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
                    "num_hidden_layers": 62, "sliding_window": None}, [(253_952, None)], 0),
    # 28 layers of which the last 4 have a window
    "Qwen2 with windows": ({"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584,
                            "num_attention_heads": 28, "num_key_value_heads": 4, "use_sliding_window": True,
                            "sliding_window": 1024, "max_window_layers": 24}, [(24 * 2048, None), (4 * 2048, 1024)], 0),
    # 34 layers, every sixth attends to all tokens: 5; 4 heads of 256
    "Gemma 3 4B": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
                    "num_hidden_layers": 34, "sliding_window": 1024}}, [(5 * 4096, None), (29 * 4096, 1024)], 0),
    # The last 15 of 35 use the caches of others; of the first 20, layers 5, 10, 15, 20 attend to all; 2 heads of 256
    "Gemma 3n E4B": ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}},
                     [(4 * 2048, None), (16 * 2048, 512)], 0),
    # As published (global_…) and as transformers 5.19 saves it (per_layer_config): 10 layers with 4 heads of 512
    "Gemma 4 31B": ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "num_hidden_layers": 60,
                     "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "sliding_window": 1024,
                     "global_head_dim": 512, "num_global_key_value_heads": 4, "attention_k_eq_v": True}},
                    [(10 * 8192, None), (50 * 16384, 1024)], 0),
    "Gemma 4 31B, saved": ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "head_dim": 256,
                            "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16,
                            "sliding_window": 1024, "per_layer_config": {
                                f"{n:02}": {"head_dim": 512, "num_key_value_heads": 4} for n in range(5, 60, 6)}}},
                           [(10 * 8192, None), (50 * 16384, 1024)], 0),
    # 24 of 42 have a cache of their own, of which 4 attend to all tokens
    "Gemma 4 E4B": ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "num_hidden_layers": 42,
                     "num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_shared_layers": 18}},
                    [(4 * 4096, None), (20 * 2048, 512)], 0),
    "gpt-oss 20B": ({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_attention_heads": 64,
                     "num_key_value_heads": 8, "head_dim": 64}, [(12 * 2048, None), (12 * 2048, 128)], 0),
    "Llama 4 Scout": ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
                      [(12 * 4096, None), (36 * 4096, 8192)], 0),
    "EXAONE 4 32B": ({"model_type": "exaone4", "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 40,
                      "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096,
                      "sliding_window_pattern": "LLLG"}, [(16 * 4096, None), (48 * 4096, 4096)], 0),
    # A window that no context reaches is none
    "Phi-4 mini": ({"model_type": "phi3", "num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 24,
                    "num_key_value_heads": 8, "sliding_window": 262144, "max_position_embeddings": 131072},
                   [(131_072, None)], 0),
    # Latents of 512 and a rotary key of 64
    "DeepSeek-V3": ({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, [(61 * 576 * 2, None)], 0),
    "Kimi K2": ({"model_type": "kimi_k2", "num_hidden_layers": 61, "num_attention_heads": 64, "kv_lora_rank": 512,
                 "qk_rope_head_dim": 64}, [(61 * 576 * 2, None)], 0),
    "Mistral Small 4": ({"model_type": "mistral4"}, [(36 * 320 * 2, None)], 0),
    # The latent is expanded before it is cached: 40 heads of 64 + 32, keys and values alike in vLLM
    "MiniCPM 3": ({"model_type": "minicpm3"}, [(62 * 2 * 40 * 96 * 2, None)], 0),
    # DeepSeek-VL2's small language model has plain heads in the same family
    "DeepSeek-V2 without latents": ({"model_type": "deepseek_v2", "kv_lora_rank": None, "num_hidden_layers": 12,
                                     "num_attention_heads": 10, "num_key_value_heads": 10, "hidden_size": 1280},
                                    [(12 * 2 * 10 * 128 * 2, None)], 0),
    # The keys by which layers choose tokens: 128 bytes of float8 and a float32 scale
    "GLM-5": ({"model_type": "glm_moe_dsa"}, [(78 * (576 * 2 + 132), None)], 0),
    # 12 of 48 layers attend; the rest: a convolution over 2 × 16 × 128 + 32 × 128 channels, 32 states of 128 × 128
    "Qwen3-Next": ({"model_type": "qwen3_next"}, [(12 * 2048, None)], 36 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)),
    "Qwen3.5 35B": ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text",
                     "full_attention_interval": 4}}, [(10 * 2048, None)],
                    30 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)),
    # Every layer has both: 3,072 channels, 2 × 256 for the one group; 24 states of 128 × 256
    "Falcon-H1 7B": ({"model_type": "falcon_h1", "num_hidden_layers": 44, "hidden_size": 3072, "head_dim": 128,
                      "num_attention_heads": 12, "num_key_value_heads": 2, "mamba_d_ssm": 3072, "mamba_n_heads": 24,
                      "mamba_d_head": 128}, [(44 * 1024, None)], 44 * (3 * (3072 + 512) * 2 + 24 * 128 * 256 * 4)),
    # Layers 4, 12, 20, 28 of 32 attend; the rest keep 3 inputs and 16 states of 8,192 channels
    "Jamba 1.5 mini": ({"model_type": "jamba"}, [(4 * 4096, None)], 28 * (3 * 8192 * 2 + 16 * 8192 * 4)),
    "Nemotron 3 Nano": ({"model_type": "nemotron_h", "num_hidden_layers": 6, "hybrid_override_pattern": "MEM*E-",
                         "num_attention_heads": 32, "num_key_value_heads": 2, "mamba_num_heads": 64},
                        [(1024, None)], 2 * (3 * (4096 + 2 * 8 * 128) * 2 + 64 * 64 * 128 * 4)),
    "Nemotron 3, states in 16 bits": (
        {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"], "mamba_num_heads": 64,
         "mamba_ssm_cache_dtype": "bfloat16"}, [(4096, None)], 3 * (4096 + 2 * 8 * 128) * 2 + 64 * 64 * 128 * 2),
    "Granite 4 H small": ({"model_type": "granitemoehybrid", "num_hidden_layers": 4, "num_key_value_heads": 8,
                           "layer_types": ["mamba", "attention", "mamba", "mamba"], "mamba_d_state": 128},
                          [(4096, None)], 3 * (3 * (8192 + 256) * 2 + 8192 * 128 * 4)),
    # Layers 4, 8, … (from 1 on) keep a latent; the rest convolve three times 32 × 128 channels
    "Kimi Linear": ({"model_type": "kimi_linear", "num_hidden_layers": 8, "linear_attn_config": {
                     "full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "num_heads": 32, "head_dim": 128,
                     "short_conv_kernel_size": 4}}, [(2 * 576 * 2, None)],
                    6 * (3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4)),
    "LFM2": ({"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [2], "hidden_size": 2048},
             [(2 * 8 * 64 * 2, None)], 3 * 2 * 2048 * 2),
    "MiniMax-01": ({"model_type": "minimax_text_01", "num_hidden_layers": 4, "attn_type_list": [0, 0, 0, 1],
                    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
                   [(4096, None)], 3 * 64 * 128 * 128 * 4),
    "Mamba-2": ({"model_type": "mamba2", "num_hidden_layers": 2, "hidden_size": 2560, "num_heads": 80},
                [], 2 * (3 * (5120 + 2 * 8 * 128) * 2 + 5120 * 128 * 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_matches_figure_by_hand(tmp_path, name):
    config, groups, state = ARCHITECTURES[name]
    cache = kv_cache(folder_with(tmp_path / "m", **{"dtype": "bfloat16"} | config))
    assert (cache.groups, cache.state_bytes, cache.note) == (tuple(groups), state, None)
    assert cache.exact
    for context in (100, 5000, 32768):
        expected = state + sum(size * min(context, window or context) for size, window in groups)
        assert cache.bytes_at(context) == expected
    windows = [window for _, window in groups if window]
    assert cache.bytes_per_token == (None if windows else sum(size for size, _ in groups))
    everything = kv_cache(tmp_path / "m", windows=False)
    assert everything.bytes_at(32768) == state + 32768 * sum(size for size, _ in groups)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("fp8", 61 * 576),
        ("q4", 61 * 576 * 9 // 16),  # 4 bits and a float16 scale for 32 elements
        ("nvfp4", 61 * 576 * 9 // 16),
        ("q8_0", 61 * 576 * 34 // 32),
    ],
)
def test_latent_is_kept_in_the_type_of_the_cache(tmp_path, dtype, expected):
    folder = folder_with(tmp_path / "m", model_type="deepseek_v3", dtype="bfloat16")
    assert kv_cache(folder, dtype, dtype).bytes_per_token == expected


def test_sparse_latent_in_float8_has_scales_and_a_16_bit_rotary_key(tmp_path):
    """vLLM's fp8_ds_mla: 512 bytes, four float32 scales, 64 bfloat16; and the indexer's keys."""
    folder = folder_with(tmp_path / "m", model_type="deepseek_v32", dtype="bfloat16")
    assert kv_cache(folder, "fp8", "fp8").bytes_per_token == 61 * (656 + 132)


def test_exllama_cache_types_give_bits_and_a_scale_per_32_elements(tmp_path):
    folder = folder_with(tmp_path / "m", **LLAMA_31_8B)
    cache = kv_cache(folder, "q6", "q4")
    assert (cache.bytes_per_token, cache.dtype) == (32 * 8 * 128 * (13 + 9) // 16, "q6/q4")


def test_quantized_cache_that_a_checkpoint_asks_for_is_a_note(tmp_path):
    """Whether it is used is up to the engine: without a type, the figure is of the 16-bit cache, and says so."""
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    cache = kv_cache(folder_with(tmp_path / "m", **LLAMA_31_8B, quantization_config=scheme))
    assert (cache.bytes_per_token, cache.dtype) == (131_072, "bfloat16")
    assert "quantized KV cache" in cache.note


def test_checkpoint_without_dtype_is_kept_in_the_type_of_its_tensors(tmp_path):
    """gpt-oss' config.json names none."""
    folder = write_checkpoint(tmp_path, dense(dtype="F16"), LLAMA_31_8B | {"torch_dtype": None})
    assert kv_cache(folder).dtype == "float16"


def test_checkpoint_without_dtype_and_both_16_bit_types_has_its_bytes(tmp_path):
    """gpt-oss as EXL3: bfloat16 norms beside float16 sign vectors, and no dtype in config.json."""
    tensors = dense() | {"model.layers.0.mlp.up_proj.suh": ("F16", (64,))}
    cache = kv_cache(write_checkpoint(tmp_path, tensors, LLAMA_31_8B | {"torch_dtype": None}))
    assert (cache.bytes_per_token, cache.dtype, cache.exact) == (131_072, "16 bits", True)


def test_given_cache_types_override_the_checkpoints(tmp_path):
    folder = folder_with(tmp_path / "m", **LLAMA_31_8B, quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    assert kv_cache(folder, "fp8", "fp8").bytes_per_token == 65_536
    # ggml's q8_0 is 34 bytes for 32 elements: 32 × 8 × 128 × (34/32 + 2)
    mixed = kv_cache(folder, "q8_0", "f16")
    assert (mixed.bytes_per_token, mixed.dtype) == (100_352, "Q8_0/F16")


def write_gguf(path: Path, arch: str = "llama", tensors: dict[str, int] | None = None, **keys: object) -> Path:
    """Write a GGUF file with these keys; tensors: rows of matrices by name."""
    writer = gguf.GGUFWriter(path, arch)
    known = {"block_count": 30, "embedding_length": 576, "attention.head_count": 9, "attention.head_count_kv": 3} | keys
    for key, value in known.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    for name, rows in ({"token_embd.weight": 4} | (tensors or {})).items():
        writer.add_tensor(name, np.zeros((rows, 576), dtype=np.float16))
    finish_gguf(writer)
    return path


LAYER = 3 * 64 * 2 * 2  # bytes per token of one layer of `write_gguf`: 3 heads of 64, keys and values in F16
MLA = {"attention.key_length": 576, "attention.value_length": 512, "attention.kv_lora_rank": 512,
       "attention.key_length_mla": 192, "attention.value_length_mla": 128, "attention.head_count_kv": 1}  # fmt: skip
SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.group_count": 2}
STATE = 3 * (512 + 2 * 2 * 16) * 4 + 512 * 16 * 4


@pytest.mark.parametrize(
    ("changes", "groups", "state"),
    [
        ({}, [(23_040, None)], 0),  # SmolLM2-135M: 30 × 3 × 64 × 2 × 2
        ({"attention.head_count_kv": None}, [(69_120, None)], 0),
        ({"attention.key_length": 128}, [(34_560, None)], 0),  # 30 × 3 × (128 + 64) × 2
        ({"block_count": 2, "attention.head_count_kv": [3, 1]}, [(1024, None)], 0),
        # llama.cpp reads no window of Mixtral's or Phi-3's
        ({"attention.sliding_window": 512, "context_length": 8192}, [(23_040, None)], 0),
        ({"arch": "phi3", "attention.sliding_window": 512, "context_length": 8192}, [(23_040, None)], 0),
        ({"arch": "glm4moe", "nextn_predict_layers": 1}, [(29 * LAYER, None)], 0),
        ({"arch": "deepseek2", **MLA}, [(30 * 576 * 2, None)], 0),
        ({"arch": "gemma3", "attention.sliding_window": 512}, [(5 * LAYER, None), (25 * LAYER, 512)], 0),
        ({"arch": "gemma3"}, [(30 * LAYER, None)], 0),
        ({"arch": "gemma3", "attention.sliding_window": 512, "context_length": 512}, [(30 * LAYER, None)], 0),
        ({"arch": "gemma3", "attention.sliding_window": 512, "attention.sliding_window_pattern": 2},
         [(15 * LAYER, None), (15 * LAYER, 512)], 0),
        ({"arch": "gemma2"}, [(15 * LAYER, None), (15 * LAYER, 4096)], 0),
        ({"arch": "llama4"}, [(7 * LAYER, None), (23 * LAYER, 8192)], 0),
        # Of the first 20, layers 5, 10, 15 and 20 attend to all tokens; the last 10 use their caches
        ({"arch": "gemma3n", "attention.sliding_window": 512}, [(4 * LAYER, None), (16 * LAYER, 512)], 0),
        ({"arch": "gemma4", "block_count": 4, "attention.sliding_window": 512, "attention.key_length_swa": 32,
          "attention.value_length_swa": 32, "attention.sliding_window_pattern": [True, False, True, False],
          "attention.shared_kv_layers": 1, "attention.head_count_kv": [3, 1, 3, 1]},
         [(LAYER // 3, None), (LAYER, 512)], 0),
        ({"arch": "falcon-h1", **SSM}, [(30 * LAYER, None)], 30 * STATE),
        ({"arch": "jamba", "block_count": 3, "attention.head_count_kv": [0, 3, 0], **SSM}, [(LAYER, None)], 2 * STATE),
        ({"arch": "nemotron_h", "block_count": 3, "attention.head_count_kv": [0, 3, 0], **SSM,
          "feed_forward_length": [0, 0, 64]}, [(LAYER, None)], STATE),
        ({"arch": "qwen3next", "nextn_predict_layers": 2, **SSM}, [(7 * LAYER, None)], 21 * STATE),
        ({"arch": "qwen35", "block_count": 3, "attention.recurrent_layers": [True, False, True], **SSM},
         [(LAYER, None)], 2 * STATE),
        ({"arch": "lfm2", "block_count": 2, "attention.head_count_kv": [0, 3], "shortconv.l_cache": 3},
         [(LAYER, None)], 2 * 576 * 4),
        ({"arch": "mamba", "attention.head_count": 0, "attention.head_count_kv": 0, **SSM, "ssm.group_count": None},
         [], 30 * (3 * 512 * 4 + 512 * 16 * 4)),
    ],
)  # fmt: skip
def test_gguf_matches_figure_by_hand(tmp_path, changes, groups, state):
    cache = kv_cache(write_gguf(tmp_path / "m.gguf", **changes))
    assert (cache.groups, cache.state_bytes, cache.note) == (tuple(groups), state, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embedding_length": None}, "key_length"),
        ({"attention.head_count_kv": [3, 1]}, "2 values for 30 layers"),
        ({"block_count": None}, "block_count"),
        ({"block_count": 2**31}, "block_count"),
        ({"arch": "gemma4", "attention.sliding_window": 512}, "sliding_window_pattern"),
        ({"arch": "brandnew", "ssm.state_size": 16}, "brandnew"),
        ({"arch": "nemotron_h", **SSM}, "feed_forward_length"),
    ],
)
def test_gguf_that_lacks_a_figure_gives_null_and_the_reason(tmp_path, changes, reason):
    cache = kv_cache(write_gguf(tmp_path / "m.gguf", **changes))
    assert (cache.groups, cache.bytes_per_token) == (None, None)
    assert reason in cache.note


def test_gguf_of_an_unknown_architecture_gets_an_upper_bound(tmp_path):
    cache = kv_cache(write_gguf(tmp_path / "m.gguf", "brandnew", **{"attention.sliding_window": 512}))
    assert (cache.bytes_per_token, cache.bytes_at(1000), cache.exact) == (None, 1000 * 23_040, False)


def test_gguf_that_stores_keys_of_a_layer_without_heads_gets_an_upper_bound(tmp_path):
    """A hybrid whose converter did not know the names of the layers' kinds: no layer has KV heads."""
    stored = {"blk.1.attn_k.weight": 192, "blk.1.attn_v.weight": 192}
    path = write_gguf(tmp_path / "m.gguf", "granitehybrid", stored,
                      **{"block_count": 3, "attention.head_count_kv": [0, 0, 0], **SSM})  # fmt: skip
    cache = kv_cache(path)
    assert (cache.exact, cache.groups, cache.state_bytes) == (False, ((LAYER, None),), 3 * STATE)
    assert "block 1" in cache.note


def test_gguf_cache_types_by_name_and_number(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    assert kv_cache(path).dtype == "F16"
    assert kv_cache(path, 8, 8).bytes_per_token == 12_240  # q8_0 by its number: 23,040 / 2 × 34/32
    assert kv_cache(path, 10_000, 8).bytes_per_token is None


def test_missing_config_gives_the_reason(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no config.json" in kv_cache(tmp_path).note


@pytest.mark.engine
def test_figure_matches_a_real_cache(tiny_llama):
    """The keys and values that transformers keeps after 17 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    cache = model(torch.arange(17)[None], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert kv_cache(tiny_llama).bytes_per_token * 17 == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.engine
def test_quantization_record_has_the_figure(tiny_llama):
    """Two layers of width 64: queries and outputs 64 × 64, keys and values 64 × 32 (two heads), MLP 3 × 64 × 128."""
    from lmeval_ext.models.record import from_storage

    facts = from_storage(str(tiny_llama), label="m", engine="e", engine_version="1")
    assert facts.architecture == "llama"
    assert facts.layer_parameters == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert (facts.kv_bytes_per_token, facts.kv_cache_dtype) == (2 * 2 * 16 * 2 * 4, "float32")
    assert not [note for note in facts.notes if "kv_bytes" in note]
    fp8 = from_storage(str(tiny_llama), ("fp8", "fp8"), label="m", engine="e", engine_version="1")
    assert fp8.kv_bytes_per_token == 2 * 2 * 16 * 2
    unknown = from_storage(str(tiny_llama), ("float7", "float7"), label="m", engine="e", engine_version="1")
    assert unknown.kv_bytes_per_token is None
    assert [note for note in unknown.notes if "kv_bytes_per_token unknown" in note]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gemma3_text"}, "gemma3"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "mistral"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": 7}, None),
        (None, None),
    ],
)
def test_architecture_is_the_decoders(config, expected, tmp_path):
    from lmeval_ext.storage.checkpoint import architecture

    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture(tmp_path) == expected
    assert architecture(tmp_path / "model.safetensors") == expected
    assert architecture(tmp_path / "model.gguf") is None
