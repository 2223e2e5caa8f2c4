"""Bytes per token in the KV cache: by hand for known models, and measured on a real cache."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from lmeval_ext.storage.kv_cache import kv_cache

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
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding-window"),
        ({"model_type": "mistral"}, "sliding-window"),  # its class has a window unless config.json says null
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "sliding-window"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "not in our table"),
        ({"model_type": "gemma3_text", "sliding_window": 512}, "not in our table"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "qwen3"}, "head_dim"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"torch_dtype": None}, "dtype"),
        ({"torch_dtype": "float9"}, "float9"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}},
         "quantized KV cache"),
    ],
)  # fmt: skip
def test_unknown_cache_gives_null_and_the_reason(tmp_path, changes, reason):
    cache = kv_cache(folder_with(tmp_path / "m", **LLAMA_31_8B | changes))
    assert cache.bytes_per_token is None
    assert cache.dtype is None
    assert reason in cache.note


def test_given_cache_types_override_the_checkpoints(tmp_path):
    folder = folder_with(tmp_path / "m", **LLAMA_31_8B, quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    assert kv_cache(folder, "fp8", "fp8").bytes_per_token == 65_536
    # ggml's q8_0 is 34 bytes for 32 elements: 32 × 8 × 128 × (34/32 + 2)
    mixed = kv_cache(folder, "q8_0", "f16")
    assert (mixed.bytes_per_token, mixed.dtype) == (100_352, "Q8_0/F16")


def write_gguf(path: Path, arch: str = "llama", **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    known = {"block_count": 30, "embedding_length": 576, "attention.head_count": 9, "attention.head_count_kv": 3} | keys
    for key, value in known.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 576), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 23_040),  # SmolLM2-135M: 30 × 3 × 64 × 2 × 2
        ({"attention.head_count_kv": None}, 69_120),
        ({"attention.key_length": 128}, 34_560),  # 30 × 3 × (128 + 64) × 2
        ({"attention.head_count_kv": [3, 1]}, None),
        ({"attention.sliding_window": 512, "context_length": 8192}, None),
        ({"attention.sliding_window": 8192, "context_length": 8192}, 23_040),
        ({"ssm.state_size": 16}, None),
        ({"embedding_length": None}, None),
        ({"arch": "gemma3"}, None),
    ],
)
def test_gguf_matches_figure_by_hand(tmp_path, changes, expected):
    cache = kv_cache(write_gguf(tmp_path / "m.gguf", **changes))
    assert cache.bytes_per_token == expected
    assert (cache.note is None) == (expected is not None)


def test_gguf_cache_types_by_name_and_number(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    assert kv_cache(path).dtype == "F16"
    assert kv_cache(path, 8, 8).bytes_per_token == 12_240  # q8_0 by its number: 23,040 / 2 × 34/32
    assert kv_cache(path, 10_000, 8).bytes_per_token is None


def test_missing_config_gives_the_reason(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no config.json" in kv_cache(tmp_path).note


def test_figure_matches_a_real_cache(tiny_llama):
    """The keys and values that transformers keeps after 17 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    cache = model(torch.arange(17)[None], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert kv_cache(tiny_llama).bytes_per_token * 17 == sum(t.numel() * t.element_size() for t in tensors)


def test_quantization_record_has_the_figure(tiny_llama):
    """Two layers of width 64: queries and outputs 64 × 64, keys and values 64 × 32 (two heads), MLP 3 × 64 × 128."""
    from lmeval_ext.models.record import from_storage

    facts = from_storage(str(tiny_llama), label="m", engine="e", engine_version="1")
    assert facts.layer_parameters == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert (facts.kv_bytes_per_token, facts.kv_cache_dtype) == (2 * 2 * 16 * 2 * 4, "float32")
    assert not [note for note in facts.notes if "kv_bytes" in note]
    fp8 = from_storage(str(tiny_llama), ("fp8", "fp8"), label="m", engine="e", engine_version="1")
    assert fp8.kv_bytes_per_token == 2 * 2 * 16 * 2
    unknown = from_storage(str(tiny_llama), ("float7", "float7"), label="m", engine="e", engine_version="1")
    assert unknown.kv_bytes_per_token is None
    assert [note for note in unknown.notes if "kv_bytes_per_token unknown" in note]
