"""What each layer keeps for attention, from GGUF metadata: the rules by which llama.cpp allocates its cache.

Source: llama.cpp, src/llama-kv-cache.cpp (rows of n_embd_k_gqa and n_embd_v_gqa per layer; no values for a latent),
src/llama-hparams.cpp (n_embd_r, n_embd_s: states, in float32), src/llama-model.cpp create_memory (which layers have
which), src/models/*.cpp load_arch_hparams (windows and their usual patterns).

One row per `general.architecture`: `PLAIN` if every layer keeps all tokens in llama.cpp, `WINDOWS` if some keep those
of a window, `STATES` if some keep a state. An architecture without a row gets an upper bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.storage.gguf_header import GGUFHeader, read_gguf
from lmeval_ext.storage.kv_layers import LayerCache, Layout, UnknownCache

LLAMA_CPP_DEFAULT = "F16"  # include/llama.h, llama_context_default_params: type_k, type_v
_MANY = 1024  # layers; llama.cpp's LLAMA_MAX_LAYERS is 512

PLAIN = frozenset({
    "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom", "chameleon", "chatglm",
    "codeshell", "cogvlm", "command-r", "dbrx", "deci", "deepseek", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe",
    "exaone", "falcon", "gemma", "glm4", "glm4moe", "gpt2", "gptneox", "granite", "granitemoe", "grok", "grovemoe",
    "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais", "jais2", "llama", "maincoder",
    "minicpm", "minicpm3", "minimax-m2", "mistral3", "mistral4", "mpt", "nemotron", "olmo", "olmoe", "openelm",
    "orion", "paddleocr", "pangu-embedded", "phi2", "phi3", "phimoe", "plamo", "plm", "qwen", "qwen2", "qwen2moe",
    "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "refact", "seed_oss", "smollm3", "stablelm", "starcoder",
    "starcoder2", "xverse",
})  # fmt: skip


@dataclass(frozen=True)
class Window:
    """period: one layer of so many keeps all tokens, 0: no layer does, None: the file lists them.

    first: it is the first of them.

    usual: the window where the file names none; None: without one there are no windows. needed: the file must name it.
    """

    period: int | None
    first: bool = False
    usual: int | None = None


WINDOWS = {
    "afmoe": Window(4), "cohere2": Window(4), "cohere2moe": Window(4, first=True), "exaone-moe": Window(4, usual=128),
    "exaone4": Window(4, usual=4096), "gemma2": Window(2, usual=4096), "gemma3": Window(6), "gemma3n": Window(5),
    "gemma4": Window(None), "gpt-oss": Window(2), "granite_swa": Window(None), "laguna": Window(4, first=True),
    "lfm2": Window(0), "llama4": Window(4, usual=8192), "mellum": Window(4), "mimo2": Window(None), "olmo2": Window(4),
    "plamo3": Window(8), "smallthinker": Window(4, first=True), "step35": Window(None),
}  # fmt: skip
_GEMMA_3N_OWN = 20  # layers with a cache of their own (src/models/gemma3n.cpp, n_layer_kv_from_start)
_EXAONE_4_WINDOWED = 64  # the number of layers of the one model that has windows (src/models/exaone4.cpp)

# Which layers keep a state: those without KV heads, those without KV heads and inner size, all but one of an interval,
# or all of them.
STATES = {
    "granitehybrid": "no heads", "jamba": "no heads", "kimi-linear": "no heads", "lfm2": "no heads",
    "lfm2moe": "no heads", "plamo2": "no heads", "nemotron_h": "no heads, no inner size",
    "nemotron_h_moe": "no heads, no inner size", "qwen3next": "interval", "qwen35": "interval", "qwen35moe": "interval",
    "falcon-h1": "both", "mamba": "all", "mamba2": "all",
}  # fmt: skip
_STATE_KEYS = re.compile(r"\.(ssm|wkv|shortconv|kda|token_shift_count|full_attention_interval|recurrent)")
_KEYS = re.compile(r"blk\.([0-9]{1,4})\.(attn_k|attn_v|attn_qkv|attn_kv_a_mqa|attn_kv_b|attn_k_b)\.weight")


class _Metadata:
    """The figures of one architecture in the metadata."""

    def __init__(self, header: GGUFHeader, kind: str) -> None:
        self.header, self.kind = header, kind

    def number(self, key: str, usual: int | None = None) -> int:
        """Return a whole number that is not negative. Raises UnknownCache if it is absent and has no usual value."""
        name = f"{self.kind}.{key}"
        value = self.header.integer(name)
        if value is None and name not in self.header.metadata and name not in self.header.arrays:
            value = usual
        if value is None or value < 0:
            differs = name in self.header.arrays
            raise UnknownCache(f"{name} differs between layers" if differs else f"the GGUF lacks {name}")
        return value

    def positive(self, key: str, usual: int | None = None) -> int:
        """Return a number above 0."""
        if (value := self.number(key, usual)) == 0:
            raise UnknownCache(f"{self.kind}.{key} is 0")
        return value

    def each(self, key: str, layers: int, usual: int | None = None) -> list[int]:
        """Return a figure of every layer: a list in the file, or one number for all."""
        listed = self.header.lists.get(f"{self.kind}.{key}")
        if listed is None:
            return [self.number(key, usual)] * layers
        values = [int(value) for value in listed]
        if len(values) < layers or min(values, default=0) < 0:
            raise UnknownCache(f"{self.kind}.{key} has {len(values)} values for {layers} layers")
        return values[:layers]

    def listed(self, key: str, layers: int) -> list[bool] | None:
        """Return a flag of every layer, None if the file has no list."""
        values = self.header.lists.get(f"{self.kind}.{key}")
        if values is None or len(values) < layers:
            return None
        return [bool(value) for value in values[:layers]]

    def flags(self, key: str, layers: int) -> list[bool]:
        """Return a flag of every layer. Raises UnknownCache if the file has none."""
        if (values := self.listed(key, layers)) is None:
            raise UnknownCache(f"the GGUF lacks {self.kind}.{key} for {layers} layers")
        return values


def read_layout(path: Path) -> Layout:
    """Return what the layers of a GGUF model keep. Raises UnknownCache where not even an upper bound is known."""
    header = read_gguf(path)
    kind = header.metadata.get("general.architecture")
    data = _Metadata(header, str(kind))
    blocks = data.positive("block_count")
    layers = blocks - data.number("nextn_predict_layers", 0)
    if not 0 < layers <= _MANY:
        raise UnknownCache(f"{kind}.block_count is {blocks}, with {blocks - layers} draft blocks")
    known = kind in PLAIN or kind in WINDOWS or kind in STATES
    doubt = None if known else f"how the layers of {kind!r} models attend is not in our table"
    if not known and any(map(_STATE_KEYS.search, (*header.metadata, *header.arrays))):
        raise UnknownCache(str(doubt))
    caches = _layers(data, layers)
    if contradiction := _stored_without_heads(data, header, caches):
        caches, doubt = contradiction
    # llama.cpp keeps states in GGML_TYPE_F32 (src/llama-model.cpp, recurrent_type_r and recurrent_type_s).
    return Layout(caches, LLAMA_CPP_DEFAULT, conv_bytes=4, recurrent_bytes=4, doubt=doubt)


def _layers(data: _Metadata, layers: int) -> tuple[LayerCache, ...]:
    """Return what each layer keeps by the metadata."""
    recurrent, attends = _recurrent(data, layers)
    state = _state(data) if any(recurrent) else (0, 0)
    empty = [LayerCache(conv=state[0] if flag else 0, recurrent=state[1] if flag else 0) for flag in recurrent]
    if not any(attends):
        return tuple(empty)
    window, windowed = _windows(data, layers)
    attention_heads = data.each("attention.head_count", layers)
    heads = (
        data.each("attention.head_count_kv", layers)
        if f"{data.kind}.attention.head_count_kv" in (*data.header.metadata, *data.header.arrays)
        else attention_heads
    )
    lengths = [_lengths(data, attention_heads, ending) for ending in ("", "_swa")]
    own = _with_own_cache(data, layers)
    caches = []
    for number in range(layers):
        key, value = lengths[windowed[number]]
        rows = heads[number] if attends[number] and number < own else 0
        caches.append(
            LayerCache(
                rows * key,
                rows * value,
                window if windowed[number] else None,
                conv=empty[number].conv,
                recurrent=empty[number].recurrent,
            )
        )
    return tuple(caches)


def _with_own_cache(data: _Metadata, layers: int) -> int:
    """Return how many layers, from the first on, have a cache of their own; the others use theirs (Gemma 3n, 4)."""
    usual = max(layers - _GEMMA_3N_OWN, 0) if data.kind == "gemma3n" else 0
    shared = data.number("attention.shared_kv_layers", usual)
    if shared >= layers:
        raise UnknownCache(f"{data.kind}.attention.shared_kv_layers is {shared} of {layers} layers")
    return layers - shared


def _lengths(data: _Metadata, attention_heads: list[int], ending: str) -> tuple[int, int]:
    """Return the elements of one key and one value of full layers ("") or of windowed ones ("_swa")."""
    usual = data.number("embedding_length", 0) // max(attention_heads[0], 1) or None
    key, value = (data.positive(f"attention.{name}_length", usual) for name in ("key", "value"))
    if ending:
        key, value = (
            data.positive(f"attention.{name}_length{ending}", full) for name, full in (("key", key), ("value", value))
        )
    latent = data.number("attention.key_length_mla", 0) and data.number("attention.value_length_mla", 0)
    if latent:
        value = 0
    indexer = data.number("attention.indexer.key_length", 0)
    return key + indexer, value


def _windows(data: _Metadata, layers: int) -> tuple[int | None, list[bool]]:
    """Return the window, and which layers have it."""
    row = WINDOWS.get(data.kind)
    window = data.number("attention.sliding_window", row.usual or 0) if row else 0
    if row is None or not window or (data.kind == "exaone4" and layers != _EXAONE_4_WINDOWED):
        return None, [False] * layers
    context = data.number("context_length", 0)
    listed = data.listed("attention.sliding_window_pattern", layers)
    if listed is None and row.period is None:
        listed = data.flags("attention.sliding_window_pattern", layers)
    if listed is None:
        period = data.number("attention.sliding_window_pattern", row.period)
        full = 0 if row.first else period - 1
        listed = [period == 0 or number % period != full for number in range(layers)]
    if context and window >= context:
        return None, [False] * layers if not _has_own_lengths(data) else listed
    return window, listed


def _has_own_lengths(data: _Metadata) -> bool:
    return any(f"{data.kind}.attention.{name}_length_swa" in data.header.metadata for name in ("key", "value"))


def _recurrent(data: _Metadata, layers: int) -> tuple[list[bool], list[bool]]:
    """Return which layers keep a state, and which keep keys and values."""
    rule = STATES.get(data.kind)
    if rule is None:
        return [False] * layers, [True] * layers
    if rule in ("all", "both"):
        return [True] * layers, [rule == "both"] * layers
    if rule == "interval":
        flags = data.listed("attention.recurrent_layers", layers)
        if flags is None:
            interval = data.positive("full_attention_interval", 4)
            flags = [(number + 1) % interval != 0 for number in range(layers)]
        return flags, [not flag for flag in flags]
    heads = data.each("attention.head_count_kv", layers)
    if rule == "no heads":
        return [not count for count in heads], [bool(count) for count in heads]
    inner = data.each("feed_forward_length", layers)
    states = [not count and not size for count, size in zip(heads, inner, strict=True)]
    return states, [bool(count) and not size for count, size in zip(heads, inner, strict=True)]


def _state(data: _Metadata) -> tuple[int, int]:
    """Return the elements of the convolution's state and of the recurrent one (n_embd_r, n_embd_s)."""
    if length := data.number("shortconv.l_cache", 0):
        return data.positive("embedding_length") * (length - 1), 0
    kernel = data.number("ssm.conv_kernel", 0)
    if dim := data.number("kda.head_dim", 0):
        heads = data.each("attention.head_count", 1)[0]
        return 3 * (kernel - 1 if kernel else 3) * heads * dim, dim * dim * heads
    inner, wide = data.positive("ssm.inner_size"), data.positive("ssm.state_size")
    return max(kernel - 1, 0) * (inner + 2 * data.number("ssm.group_count", 0) * wide), wide * inner


def _stored_without_heads(
    data: _Metadata, header: GGUFHeader, caches: tuple[LayerCache, ...]
) -> tuple[tuple[LayerCache, ...], str] | None:
    """Return an upper bound and the reason if a layer that keeps nothing, by the metadata, stores key matrices."""
    rows: dict[int, dict[str, int]] = {}
    for tensor in header.tensors:
        if (match := _KEYS.fullmatch(tensor.name)) and len(tensor.shape) == 2 and int(match[1]) < len(caches):
            rows.setdefault(int(match[1]), {})[match[2]] = tensor.shape[0]
    own = _with_own_cache(data, len(caches))
    wrong = [number for number in rows if number < own and not caches[number].keys and "attn_k" in rows[number]]
    if not wrong:
        return None
    fixed = list(caches)
    for number in wrong:
        state: dict[str, Any] = {"conv": caches[number].conv, "recurrent": caches[number].recurrent}
        fixed[number] = LayerCache(rows[number]["attn_k"], rows[number].get("attn_v", rows[number]["attn_k"]), **state)
    return tuple(fixed), f"block {wrong[0]} has no KV heads by the metadata, but stores keys"
