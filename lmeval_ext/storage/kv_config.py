"""What each layer keeps for attention, from config.json.

A family with a row in `kv_families.FAMILIES` is read exactly. For any other model, and where a field contradicts its
family, every layer is taken to keep the largest keys and values that the config names, for all tokens: an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmeval_ext.storage.checkpoint import Checkpoint, read_config
from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.kv_families import (
    CHUNKED,
    FAMILIES,
    FULL,
    HYBRID,
    KINDS,
    LINEAR,
    NOTHING,
    SLIDING,
    Family,
    Fields,
)
from lmeval_ext.storage.kv_layers import SIXTEEN_BITS, LayerCache, Layout, UnknownCache
from lmeval_ext.storage.shards import read_tensors

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
# Lists of the kinds of layers; the second is Nemotron-H's, Jamba's and Zamba's.
_KIND_LISTS = ("layer_types", "layers_block_type")
# Fields by which a family shares or thins out its cache in a way that its row does not describe.
_CONTRADICTIONS = ("use_cla", "cross_attention_layers", "kv_shared_layers", "nsa_config")
# Fields of states that do not grow; without a row their size is unknown, and it can exceed that of keys and values.
_STATES = re.compile(
    r"mamba|ssm|conv|recurrent|rwkv|wkv|lightning|linear_(num|key|value|attn|head)|delta|time_step|lru"
)
_INDEXED = {"deepseek_v32", "glm_moe_dsa"}
_INDEXER_BLOCK, _SCALE_BYTES = 128, 4  # vLLM keeps the indexer's keys in float8 with a float32 scale for 128 elements
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "half": 2, "float": 4}
_STORED = {"BF16": "bfloat16", "F16": "float16"}
_MANY = 10_000  # layers; more are no model


def read_layout(path: Path, dtype_given: bool) -> Layout:
    """Return what the layers of a checkpoint folder, or of the folder of a .safetensors file, keep.

    dtype_given: the caller names the type of the cache, so that the checkpoint need not. Raises UnknownCache where
    config.json does not give even an upper bound, StorageError where it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise UnknownCache("no config.json")
    checkpoint = read_config(folder)
    dtype = _dtype(path, checkpoint, dtype_given)
    config = checkpoint.text_config
    layers, doubt = _layers(config)
    fields = Fields(config, {})
    recurrent = fields.get("mamba_ssm_cache_dtype", "mamba_ssm_dtype")
    return Layout(
        layers,
        dtype,
        conv_bytes=_BYTES.get(dtype, 4),
        recurrent_bytes=_BYTES.get(str(recurrent).removeprefix("torch."), 4),
        doubt=doubt,
        note=_quantized_cache(checkpoint),
    )


def _dtype(path: Path, checkpoint: Checkpoint, given: bool) -> str:
    """Return the checkpoint's dtype; "" if it has none and none is needed."""
    places = (checkpoint.text_config, checkpoint.config)
    dtype = next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), None)
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    if given:
        return ""
    # gpt-oss names none: engines then take the 16-bit type that tensors are stored in.
    try:
        stored = {form.dtype for header in read_tensors(path, []).headers for form in header.forms} & set(_STORED)
    except StorageError:
        stored = set()
    if not stored:
        raise UnknownCache("config.json names no dtype")
    # Scales and sign vectors may be float16 beside bfloat16 norms (EXL3): the bytes are the same
    return _STORED[stored.pop()] if len(stored) == 1 else SIXTEEN_BITS


def _quantized_cache(checkpoint: Checkpoint) -> str | None:
    """Return a note if the checkpoint asks for a quantized KV cache, which is up to the engine.

    The keys are compressed-tensors' `kv_cache_scheme` and ModelOpt's `kv_cache_quant_algo`.
    """
    nested = checkpoint.quantization.get("quantization")
    places = [checkpoint.quantization, nested if isinstance(nested, dict) else {}]
    if any(place.get(key) for place in places for key in ("kv_cache_scheme", "kv_cache_quant_algo")):
        return "the checkpoint asks for a quantized KV cache"
    return None


def _layers(config: Mapping[str, Any]) -> tuple[tuple[LayerCache, ...], str | None]:
    """Return what each layer keeps, and why it is an upper bound only (None: it is exact)."""
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        return _bound(config, f"how the layers of {model_type!r} models attend is not in our table")
    if contradiction := next((key for key in _CONTRADICTIONS if config.get(key)), None):
        return _bound(config, f"{contradiction} in config.json: layers share caches in a way that is not in our table")
    fields = Fields(config, family.usual)
    kinds = _kinds(fields, family)
    unknown = sorted({kind for kind in kinds if kind not in KINDS})
    if unknown:
        return _bound(config, f"layers of the kind {unknown[0]!r} are not in our table")
    if family.state is None and (sign := next(filter(None, (_sign_of_state(item) for item in config.items())), None)):
        return _bound(config, f"{sign} in config.json: {model_type!r} models have no such layers in our table")
    if family.state is None and {KINDS[kind] for kind in kinds} & {LINEAR, HYBRID, NOTHING}:
        return _bound(config, f"layer_types in config.json: {model_type!r} models keep no states in our table")
    if config.get("kv_lora_rank") and "kv_lora_rank" not in family.usual:
        return _bound(config, f"kv_lora_rank in config.json: {model_type!r} models keep no latent in our table")
    window = fields.get(family.window)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 0):
        raise UnknownCache(f"{family.window} in config.json is {window!r}, expected a whole number")
    own = len(kinds) - (fields.get("num_kv_shared_layers") or 0)
    if not isinstance(own, int) or not 0 < own <= len(kinds):
        raise UnknownCache("num_kv_shared_layers in config.json is not less than the number of layers")
    state = family.state(fields) if family.state and {KINDS[kind] for kind in kinds} & {LINEAR, HYBRID} else (0, 0)
    doubt = None
    if "shared" in (fields.get("indexer_types") or ()):
        doubt = "indexer_types in config.json: which layers keep the indexer's keys is not in our table"
    return tuple(
        _layer(fields, model_type, KINDS[kind], number, _effective(window, config), state)
        for number, kind in enumerate(kinds[:own])
    ), doubt


def _sign_of_state(item: tuple[str, Any]) -> str | None:
    """Return the name of a field if it is of layers that keep a state, and switched on."""
    name, value = item
    return name if value and not isinstance(value, bool) and _STATES.search(name) else None


def _kinds(fields: Fields, family: Family) -> list[str]:
    """Return the kind of each layer. Raises UnknownCache if the config does not give one for each."""
    listed = next((fields.get(name) for name in _KIND_LISTS if fields.get(name) is not None), None)
    count = fields.optional(*_LAYERS)
    if count is not None and count > _MANY:
        raise UnknownCache(f"config.json has {count:,} layers")
    if listed is not None:
        if not isinstance(listed, list) or not listed or len(listed) > _MANY:
            raise UnknownCache("layer_types in config.json is not a list with one kind per layer")
        kinds = list(map(str, listed))
        # A quantized Qwen2 or Qwen3 that was saved again lists its kinds, and switches the window off apart from them.
        if fields.get("use_sliding_window") is False:
            kinds = [FULL if kind == SLIDING else kind for kind in kinds]
    elif family.kinds is not None:
        kinds = family.kinds(fields, count or 0)
    else:
        kinds = [FULL] * fields.count(*_LAYERS)
    if not kinds or (count is not None and len(kinds) != count):
        raise UnknownCache(f"config.json names the kinds of {len(kinds)} layers of {count or 0}")
    return kinds


def _effective(window: int | None, config: Mapping[str, Any]) -> int | None:
    """Return the window; None if there is none, or none that is shorter than the model's longest context."""
    longest = config.get("max_position_embeddings")
    if not window or (isinstance(longest, int) and not isinstance(longest, bool) and window >= longest > 0):
        return None
    return window


def _layer(
    fields: Fields, model_type: str, kind: str, number: int, window: int | None, state: tuple[int, int]
) -> LayerCache:
    """Return what one layer keeps."""
    conv, recurrent = state if kind in (LINEAR, HYBRID) else (0, 0)
    if kind not in (FULL, SLIDING, CHUNKED, HYBRID):
        return LayerCache(conv=conv, recurrent=recurrent)
    window = window if kind in (SLIDING, CHUNKED) else None
    if fields.get("kv_lora_rank") and FAMILIES[model_type].expanded:
        elements = fields.count(*_HEADS) * (fields.count("qk_nope_head_dim") + fields.count("qk_rope_head_dim"))
        return LayerCache(elements, elements, window)
    if fields.get("kv_lora_rank"):
        # One latent and one rotary key per token, for all heads (vLLM, MLAAttentionSpec).
        latent = fields.count("kv_lora_rank") + fields.count("qk_rope_head_dim")
        indexer = 0
        if model_type in _INDEXED:
            wide = fields.count("index_head_dim")
            indexer = wide + wide // _INDEXER_BLOCK * _SCALE_BYTES
        return LayerCache(keys=latent, window=window, indexer_bytes=indexer)
    own = Fields(_overrides(fields, number), {})
    heads, dim = _heads(fields, own), _dimension(fields, own)
    if model_type == "gemma4_text" and kind == FULL and "per_layer_config" not in fields.config:
        dim = fields.count("global_head_dim")
        if fields.get("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
            heads = fields.count("num_global_key_value_heads")
    return LayerCache(heads * dim, heads * dim, window, conv=conv, recurrent=recurrent)


def _overrides(fields: Fields, number: int) -> dict[str, Any]:
    """Return what `per_layer_config` of transformers says of one layer; its keys are numbers such as "05"."""
    layers = fields.get("per_layer_config")
    if not isinstance(layers, dict):
        return {}
    own = [value for key, value in layers.items() if str(key).isdecimal() and len(str(key)) < 9 and int(key) == number]
    if own and (not isinstance(own[0], dict) or "sliding_window" in own[0]):
        raise UnknownCache("per_layer_config in config.json changes more than heads")
    return own[0] if own else {}


def _heads(fields: Fields, own: Fields) -> int:
    """Return the KV heads of a layer: its own, the model's, or as many as attention heads where that is usual."""
    if (heads := own.optional("num_key_value_heads")) is not None:
        return heads
    if fields.get(*_KV_HEADS) is not None:
        return fields.count(*_KV_HEADS)
    if not any(name in source for source in (fields.config, fields.usual) for name in _KV_HEADS):
        raise UnknownCache("config.json does not say num_key_value_heads")
    return fields.count(*_HEADS)


def _dimension(fields: Fields, own: Fields) -> int:
    """Return the elements of one head: head_dim, or hidden_size / num_attention_heads."""
    if (dim := own.optional("head_dim") or fields.optional("head_dim", "kv_channels")) is not None:
        return dim
    hidden, heads = fields.count(*_HIDDEN), fields.count(*_HEADS)
    return hidden // heads


def _bound(config: Mapping[str, Any], doubt: str) -> tuple[tuple[LayerCache, ...], str]:
    """Return full attention in every layer, with the largest keys and values that the config names, and the doubt.

    Raises UnknownCache, with the doubt, if the config does not name layers and heads, or if layers keep states.
    """
    if config.get("is_encoder_decoder") or any(map(_sign_of_state, config.items())):
        raise UnknownCache(doubt)
    fields = Fields(config, {})
    try:
        layers, attention = fields.count(*_LAYERS), fields.count(*_HEADS)
        largest = {name: _largest(config, name) for name in ("key_value_heads", "head_dim")}
        heads = largest["key_value_heads"] or fields.optional(*_KV_HEADS) or attention
        dim = max(largest["head_dim"], -(-fields.count(*_HIDDEN) // attention))
        dim = max(dim, (_largest(config, "qk_nope_head_dim") + _largest(config, "qk_rope_head_dim")))
    except UnknownCache:
        raise UnknownCache(doubt) from None
    if layers > _MANY:
        raise UnknownCache(doubt)
    indexer = 2 * _largest(config, "index_head_dim") + _largest(config, "index_dim")
    return (LayerCache(heads * dim, heads * dim, indexer_bytes=indexer),) * layers, doubt


def _largest(config: Mapping[str, Any], ending: str) -> int:
    """Return the largest number in a field whose name ends so, per-layer fields and lists included; 0 without one."""
    largest = 0
    for name, value in config.items():
        if isinstance(value, dict) and name.startswith("per_layer"):
            largest = max([largest, *(_largest(part, ending) for part in value.values() if isinstance(part, dict))])
        elif re.search(rf"(^|_){ending}(s?_per_layer)?$", name):
            numbers = value if isinstance(value, list) else [value]
            largest = max([largest, *(number for number in numbers if type(number) is int)])
    return largest
