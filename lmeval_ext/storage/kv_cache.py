"""Bytes of the KV cache at any context, from config.json or GGUF metadata alone.

A layer that attends to all tokens keeps one key and one value per KV head and token; one with a sliding window keeps
those of at most `window` tokens; one with a latent (MLA) keeps the latent and a rotary key; linear attention and Mamba
keep a state of a constant size; a layer that uses another's cache keeps nothing. So the bytes at a context of n tokens
of one sequence are

    state + Σ bytes per token × min(n, window)

Sources: vLLM, v1/kv_cache_interface.py (`page_size_bytes` of one block of one token: AttentionSpec, MLAAttentionSpec,
SlidingWindowSpec, MambaSpec); llama.cpp, src/llama-kv-cache.cpp and llama-memory-recurrent.cpp. Engines allocate whole
blocks, and keep a window's tokens plus those of one batch: that is not counted here.

Files: `kv_layers` (the record between), `kv_config` and `kv_gguf` (readers), `kv_families` (one row per model type).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lmeval_ext.storage import kv_config
from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.kv_layers import SIXTEEN_BITS, LayerCache, Layout, UnknownCache
from lmeval_ext.storage.measure import gguf_file

# Bytes per element by name. vLLM's fp8 caches have one scale per layer, which adds nothing per token; its NVFP4 has one
# byte of scale for 16 elements (vllm/utils/torch_utils.py, nvfp4_kv_cache_full_dim).
_BYTES = {
    "float32": Fraction(4), "float": Fraction(4), "bfloat16": Fraction(2), "float16": Fraction(2), "half": Fraction(2),
    SIXTEEN_BITS: Fraction(2),
    "fp8": Fraction(1), "fp8_e4m3": Fraction(1), "fp8_e5m2": Fraction(1), "fp8_inc": Fraction(1),
    "nvfp4": Fraction(9, 16), "nvfp4_4over6": Fraction(9, 16),
}  # fmt: skip
# ExLlama's quantized caches: so many bits, and a float16 scale for 32 elements (exllamav3, cache/quant.py).
_EXLLAMA = re.compile(r"q([2-8])")
# vLLM's layout of a latent whose sparse attention reads float8: 4 float32 scales per 512, and a bfloat16 rotary key
# (vllm/v1/attention/backends/mla/flashmla_sparse.py: 656 bytes for 512 + 64).
_SPARSE_FLOAT8 = {"fp8", "fp8_e4m3", "fp8_ds_mla"}
_SCALED, _ROTARY = 128, 64


@dataclass(frozen=True)
class KVCache:
    """Size of the KV cache.

    groups: bytes per token, and the window (None: all tokens), of the layers that share a window. state_bytes: what
    does not grow with the context. exact: False for an upper bound. dtype: "bfloat16", "Q8_0", or "Q8_0/F16" where keys
    and values differ. note: why the size is unknown (then groups is None) or an upper bound, or what to know of it.
    """

    groups: tuple[tuple[int, int | None], ...] | None = None
    state_bytes: int = 0
    exact: bool = True
    dtype: str | None = None
    note: str | None = None

    @property
    def bytes_per_token(self) -> int | None:
        """Return the bytes that every further token takes; None if that is unknown or differs with the context."""
        if self.groups is None or not self.exact or any(window is not None for _, window in self.groups):
            return None
        return sum(size for size, _ in self.groups)

    def bytes_at(self, context: int) -> int | None:
        """Return the bytes for one sequence of `context` tokens (at most so many, if not exact); None if unknown."""
        if self.groups is None:
            return None
        tokens = ((size, context if window is None else min(context, window)) for size, window in self.groups)
        return self.state_bytes + sum(size * count for size, count in tokens)

    def to_dict(self) -> dict[str, Any] | None:
        """Return the record for a result file, None if unknown."""
        if self.groups is None:
            return None
        groups = [{"bytes_per_token": size, "window": window} for size, window in self.groups]
        return {"groups": groups, "state_bytes": self.state_bytes, "upper_bound": not self.exact}


def kv_cache(
    path: str | Path, key_dtype: str | int | None = None, value_dtype: str | int | None = None, windows: bool = True
) -> KVCache:
    """Return the size of the KV cache of a checkpoint folder, a .safetensors file or a .gguf file.

    key_dtype, value_dtype: types that the engine stores keys and values in: a torch name, one of vLLM's names, "q2" to
    "q8" of ExLlama, or a ggml type by name or number. None: the 16-bit type of the checkpoint, whatever it asks for;
    for GGUF F16, as in llama.cpp. windows: whether the engine drops tokens that have left a sliding window.
    """
    try:
        gguf = gguf_file(Path(path))
        given = None not in (key_dtype, value_dtype)
        layout = _gguf_layout(gguf) if gguf else kv_config.read_layout(Path(path), given)
        key = layout.dtype if key_dtype is None else key_dtype
        value = layout.dtype if value_dtype is None else value_dtype
        return _sized(layout, key, value, windows)
    except UnknownCache as reason:
        return KVCache(note=f"kv_bytes_per_token unknown: {reason}")
    except (StorageError, OSError) as error:
        return KVCache(note=f"kv_bytes_per_token unknown: {error}")


def _gguf_layout(path: Path) -> Layout:
    from lmeval_ext.storage import kv_gguf  # imports numpy, through gguf

    return kv_gguf.read_layout(path)


def _sized(layout: Layout, key: str | int, value: str | int, windows: bool) -> KVCache:
    """Turn elements into bytes. Raises UnknownCache for a type of unknown size."""
    groups: dict[int | None, int] = {}
    sizes: Mapping[LayerCache, int] = {layer: _per_token(layer, key, value) for layer in set(layout.layers)}
    for layer in layout.layers:
        if sizes[layer]:
            window = layer.window if windows else None
            groups[window] = groups.get(window, 0) + sizes[layer]
    state = sum(layer.conv * layout.conv_bytes + layer.recurrent * layout.recurrent_bytes for layer in layout.layers)
    names = [_name(key), _name(value)] if any(layer.values for layer in layout.layers) else [_name(key)]
    note = layout.note
    if layout.doubt:
        note = f"kv_bytes_per_token is known as an upper bound only: {layout.doubt}"
    return KVCache(
        tuple((size, window) for window, size in sorted(groups.items(), key=lambda group: group[0] or 0)),
        state,
        layout.doubt is None,
        names[0] if len(set(names)) == 1 else "/".join(names),
        note,
    )


def _per_token(layer: LayerCache, key: str | int, value: str | int) -> int:
    """Return the bytes that one layer keeps per token."""
    if layer.indexer_bytes and not layer.values and key in _SPARSE_FLOAT8:
        latent = layer.keys - _ROTARY
        return latent + latent // _SCALED * 4 + 2 * _ROTARY + layer.indexer_bytes
    total = (_row(layer.keys, key) if layer.keys else 0) + (_row(layer.values, value) if layer.values else 0)
    return total + layer.indexer_bytes


def _row(elements: int, dtype: str | int) -> int:
    """Return the bytes of one row of keys or values."""
    total = elements * _bytes(dtype)
    if total.denominator != 1:
        raise UnknownCache(f"rows of {elements} elements are no whole blocks of {dtype}")
    return int(total)


def _bytes(dtype: str | int) -> Fraction:
    """Return the bytes per element, a fraction for block formats such as Q8_0 (34 bytes per 32 elements)."""
    if isinstance(dtype, str) and dtype in _BYTES:
        return _BYTES[dtype]
    if isinstance(dtype, str) and (match := _EXLLAMA.fullmatch(dtype)):
        return Fraction(2 * int(match[1]) + 1, 16)
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[_name(dtype)]]
    except KeyError:
        raise UnknownCache(f"the size of the cache type {dtype!r} is not known") from None
    return Fraction(size, block)


def _name(dtype: str | int) -> str:
    """Return the name to record: torch's for a torch type, ggml's for a name or number of ggml."""
    if isinstance(dtype, str):
        return dtype if dtype in _BYTES or _EXLLAMA.fullmatch(dtype) else dtype.upper()
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(dtype).name
    except ValueError:
        return str(dtype)
