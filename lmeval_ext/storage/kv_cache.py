"""Bytes per token in the KV cache, from config.json or GGUF metadata alone.

Every layer keeps one key vector and one value vector per KV head and token:

    layers × KV heads × (key length × bytes + value length × bytes)

This is vLLM's `FullAttentionSpec.page_size_bytes` for a block of one token (vllm/v1/kv_cache_interface.py) and
llama.cpp's `n_embd_k_gqa` and `n_embd_v_gqa` per layer (src/llama-kv-cache.cpp). It holds for models in which every
layer attends to all tokens. Sliding windows, latent attention (MLA), recurrent layers and shared caches give None and
the reason, and so does every architecture without a row in the tables.

`FULL_ATTENTION` has one row per `model_type` of transformers, `GGUF_FULL_ATTENTION` one per `general.architecture` of
llama.cpp. To add an architecture whose layers all attend to all tokens, add its row, and a case worked out by hand to
`tests/storage/test_kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lmeval_ext.storage.checkpoint import Checkpoint, read_config
from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.measure import gguf_file

# One row per `model_type` of transformers whose layers all attend to all tokens: the figures that have a usual value
# where config.json does not name them (transformers 5.19, models/*/configuration_*.py). KV heads: as many as attention
# heads. Head dimension: hidden_size / num_attention_heads. Where a config class has a default of its own, the figure is
# not in the row, and config.json must name it.
_HEADS, _DIMENSION = "kv heads", "head_dim"
FULL_ATTENTION: dict[str, frozenset[str]] = {
    "llama": frozenset({_HEADS, _DIMENSION}),
    "arcee": frozenset({_HEADS, _DIMENSION}),
    "cohere": frozenset({_HEADS, _DIMENSION}),
    "granite": frozenset({_HEADS, _DIMENSION}),
    "granitemoe": frozenset({_HEADS, _DIMENSION}),
    "olmo": frozenset({_HEADS, _DIMENSION}),
    "olmo2": frozenset({_HEADS, _DIMENSION}),
    "olmoe": frozenset({_HEADS, _DIMENSION}),
    "phi": frozenset({_HEADS, _DIMENSION}),
    "phi3": frozenset({_HEADS, _DIMENSION}),
    "mistral": frozenset({_DIMENSION}),
    "mixtral": frozenset({_DIMENSION}),
    "qwen2": frozenset({_DIMENSION}),
    "qwen2_moe": frozenset({_DIMENSION}),
    "qwen3": frozenset(),
    "qwen3_moe": frozenset(),
    "smollm3": frozenset({_DIMENSION}),
    "stablelm": frozenset({_DIMENSION}),
    "starcoder2": frozenset({_DIMENSION}),
    "gemma": frozenset(),
    "glm": frozenset(),
    "glm4": frozenset(),
    "seed_oss": frozenset(),
}
# mistral: sliding windows are used unless sliding_window is null in config.json.
_WINDOWED_BY_DEFAULT = {"mistral"}
# These use a sliding window only if use_sliding_window is true.
_WINDOWED_ON_REQUEST = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
# Keys of config.json that mean another kind of cache than plain keys and values in every layer.
_OTHER_CACHES = ("kv_lora_rank", "num_kv_shared_layers", "full_attention_interval", "attn_layer_period", "ssm_cfg",
                 "linear_num_value_heads", "hybrid_override_pattern", "mamba_d_state")  # fmt: skip

# One row per `general.architecture` whose layers all attend to all tokens (llama.cpp, src/llama-arch.cpp).
GGUF_FULL_ATTENTION = frozenset({
    "llama", "arcee", "command-r", "gemma", "glm4", "granite", "granitemoe", "internlm2", "olmo", "olmo2", "olmoe",
    "phi2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
_GGUF_OTHER_CACHES = ("attention.kv_lora_rank", "attention.key_length_mla", "attention.shared_kv_layers",
                      "full_attention_interval", "ssm.state_size")  # fmt: skip

# Bytes per element. vLLM's fp8 caches have one scale per layer, which adds nothing per token.
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
LLAMA_CPP_DEFAULT = "F16"  # include/llama.h, llama_context_default_params: type_k, type_v


@dataclass(frozen=True)
class KVCache:
    """Size of the KV cache.

    bytes_per_token: None if unknown; then `note` gives the reason. dtype: "bfloat16", "Q8_0", or "Q8_0/F16" where keys
    and values differ.
    """

    bytes_per_token: int | None = None
    dtype: str | None = None
    note: str | None = None


class _Unknown(Exception):
    """The figure cannot be known. The message gives the reason."""


def kv_cache(path: str | Path, key_dtype: str | int | None = None, value_dtype: str | int | None = None) -> KVCache:
    """Return the size of the KV cache of a checkpoint folder, a .safetensors file or a .gguf file.

    key_dtype, value_dtype: types that the engine stores keys and values in: a torch name, one of vLLM's fp8 names, or a
    ggml type by name or number. None: the checkpoint's own 16-bit type; for GGUF F16, as in llama.cpp.
    """
    try:
        gguf = gguf_file(Path(path))
        types_given = None not in (key_dtype, value_dtype)
        shape, default = _from_gguf(gguf) if gguf else _from_config(Path(path), types_given)
        key = default if key_dtype is None else key_dtype
        value = default if value_dtype is None else value_dtype
        layers, heads, key_length, value_length = shape
        bytes_per_head = key_length * _bytes(key) + value_length * _bytes(value)
    except _Unknown as reason:
        return KVCache(note=f"kv_bytes_per_token unknown: {reason}")
    except (StorageError, OSError) as error:
        return KVCache(note=f"kv_bytes_per_token unknown: {error}")
    total = layers * heads * bytes_per_head
    if total.denominator != 1:
        return KVCache(note=f"kv_bytes_per_token unknown: heads of {key_length} are no whole blocks of {key}")
    names = [_name(key), _name(value)]
    return KVCache(int(total), names[0] if names[0] == names[1] else "/".join(names))


def _bytes(dtype: str | int) -> Fraction:
    """Return the bytes per element, a fraction for block formats such as Q8_0 (34 bytes per 32 elements)."""
    if isinstance(dtype, str) and dtype in _BYTES:
        return Fraction(_BYTES[dtype])
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[_name(dtype)]]
    except KeyError:
        raise _Unknown(f"the size of the cache type {dtype!r} is not known") from None
    return Fraction(size, block)


def _name(dtype: str | int) -> str:
    """Return the name to record: torch's for a torch type, ggml's for a name or number of ggml."""
    if isinstance(dtype, str):
        return dtype if dtype in _BYTES else dtype.upper()
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(dtype).name
    except ValueError:
        return str(dtype)


Shape = tuple[int, int, int, int]  # layers, KV heads, key length, value length


def _from_config(path: Path, types_given: bool) -> tuple[Shape, str]:
    """Return the shape of the cache and the checkpoint's dtype ("" where the caller gives both types)."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise _Unknown("no config.json")
    checkpoint = read_config(folder)
    config, model_type = checkpoint.text_config, str(checkpoint.text_config.get("model_type"))
    with_default = FULL_ATTENTION.get(model_type)
    if with_default is None:
        raise _Unknown(f"whether every layer of {model_type!r} models attends to all tokens is not in our table")
    _check_attention(config, model_type)
    attention_heads = _count(config, "num_attention_heads")
    heads = _count(config, "num_key_value_heads", attention_heads if _HEADS in with_default else None)
    hidden = config.get("hidden_size")
    usual = hidden // attention_heads if _DIMENSION in with_default and isinstance(hidden, int) else None
    dimension = _count(config, "head_dim", usual)
    shape = (_count(config, "num_hidden_layers"), heads, dimension, dimension)
    if types_given:
        return shape, ""
    if _quantized_cache(checkpoint):
        raise _Unknown("the checkpoint asks for a quantized KV cache; name the type that the engine uses")
    dtype = next((c[k] for c in (config, checkpoint.config) for k in ("dtype", "torch_dtype") if c.get(k)), None)
    if not isinstance(dtype, str):
        raise _Unknown("config.json names no dtype")
    return shape, dtype.removeprefix("torch.")


def _check_attention(config: Mapping[str, Any], model_type: str) -> None:
    """Raise _Unknown if the config shows that not every layer attends to all tokens."""
    for key in _OTHER_CACHES:
        if config.get(key):
            raise _Unknown(f"{key} in config.json: not every layer keeps plain keys and values")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and set(map(str, kinds)) != {"full_attention"}:
        raise _Unknown(f"layer_types in config.json: {', '.join(sorted(set(map(str, kinds)))) or 'none'}")
    window = config.get("sliding_window")
    absent = "sliding_window" not in config and model_type in _WINDOWED_BY_DEFAULT
    if absent or (window is not None and _window_is_used(config, model_type, window)):
        raise _Unknown("sliding-window attention: the cache stops growing at the window, engines differ in how")


def _window_is_used(config: Mapping[str, Any], model_type: str, window: Any) -> bool:
    """Return whether a sliding window is switched on and shorter than the model's context."""
    if not config.get("use_sliding_window", model_type not in _WINDOWED_ON_REQUEST):
        return False
    context = config.get("max_position_embeddings")
    return not (isinstance(window, int) and isinstance(context, int) and window >= context)


def _quantized_cache(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint asks for a quantized KV cache.

    The keys are compressed-tensors' `kv_cache_scheme` and ModelOpt's `kv_cache_quant_algo`.
    """
    nested = checkpoint.quantization.get("quantization")
    places = [checkpoint.quantization, nested if isinstance(nested, dict) else {}]
    return any(place.get(key) for place in places for key in ("kv_cache_scheme", "kv_cache_quant_algo"))


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive whole number of the config. Raises _Unknown if it is absent and has no default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _Unknown(f"config.json does not say {key}")
    return value


def _from_gguf(path: Path) -> tuple[Shape, str]:
    """Return the shape of the cache and llama.cpp's default type."""
    from lmeval_ext.storage.gguf_header import read_gguf

    header = read_gguf(path)
    kind = header.metadata.get("general.architecture")
    if kind not in GGUF_FULL_ATTENTION:
        raise _Unknown(f"whether every layer of {kind!r} models attends to all tokens is not in our table")
    for key in _GGUF_OTHER_CACHES:
        if header.metadata.get(f"{kind}.{key}"):
            raise _Unknown(f"{kind}.{key} in the GGUF: not every layer keeps plain keys and values")
    window, context = header.integer(f"{kind}.attention.sliding_window"), header.integer(f"{kind}.context_length")
    if window and not (context and window >= context):
        raise _Unknown("sliding-window attention: the cache stops growing at the window, engines differ in how")

    def figure(key: str, default: int | None = None) -> int:
        name = f"{kind}.{key}"
        value = header.integer(name)
        if value is None and name not in header.arrays:
            value = default
        if value is None or value <= 0:
            raise _Unknown(f"{name} differs between layers" if name in header.arrays else f"the GGUF lacks {name}")
        return value

    layers = figure("block_count") - (header.integer(f"{kind}.nextn_predict_layers") or 0)
    attention_heads = figure("attention.head_count")
    usual = figure("embedding_length") // attention_heads
    heads = figure("attention.head_count_kv", attention_heads)
    shape = (layers, heads, figure("attention.key_length", usual), figure("attention.value_length", usual))
    return shape, LLAMA_CPP_DEFAULT
