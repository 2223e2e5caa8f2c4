"""How the layers of each family of models attend: one row of `FAMILIES` per `model_type` of config.json.

A row holds the usual values of figures that published configs leave out (transformers 5.19, the fields of
models/*/configuration_*.py: composite models save only what differs from them), which layers attend to what where the
config has no `layer_types`, and which states that do not grow its layers keep. Model types of remote code have no usual
values: config.json must name their figures.

To add a family: one row, and a case worked out by hand in `tests/storage/test_kv_cache.py`. A model type without a row
gets an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lmeval_ext.storage.kv_layers import UnknownCache

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, HYBRID, NOTHING = "linear_attention", "hybrid", "moe"
# Former names of kinds of layers, and other words for those that keep nothing for attention.
KINDS = {
    "attention": FULL, "mamba": LINEAR, "mamba2": LINEAR, "conv": LINEAR, "mlp": NOTHING, "moe": NOTHING,
    "full_attention": FULL, "sliding_attention": SLIDING, "chunked_attention": CHUNKED, "linear_attention": LINEAR,
    "hybrid": HYBRID, "deepseek_sparse_attention": FULL, "indexed_attention": FULL,
}  # fmt: skip


class Fields:
    """The fields of a config, with the usual values of its family where the config does not have them."""

    def __init__(self, config: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
        self.config, self.usual = config, usual

    def get(self, *names: str) -> Any:
        """Return the value of the first of `names` that is there, None if it is null or none is there."""
        for source in (self.config, self.usual):
            for name in names:
                if name in source:
                    return source[name]
        return None

    def count(self, *names: str) -> int:
        """Return a positive whole number. Raises UnknownCache if there is none of these names."""
        value = self.get(*names)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UnknownCache(f"config.json does not say {names[0]}")
        return value

    def optional(self, *names: str) -> int | None:
        """Return a positive whole number, None if it is absent or null."""
        return self.count(*names) if self.get(*names) is not None else None

    def numbers(self, name: str) -> list[int]:
        """Return a list of whole numbers. Raises UnknownCache if the field is not one."""
        value = self.get(name)
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise UnknownCache(f"{name} in config.json is not a list of whole numbers")
        return value


Kinds = Callable[[Fields, int], list[str]]  # from the fields and the number of layers to the kind of each layer
State = Callable[[Fields], tuple[int, int]]  # elements of the convolution's state and of the recurrent one, per layer


@dataclass(frozen=True)
class Family:
    """One row. usual: values of absent fields. kinds: of the layers, where the config has no list. state: see `State`.

    window: the name of the field that holds the window. expanded: whether keys and values of every head are cached
    although they come from a latent.
    """

    usual: Mapping[str, Any] = field(default_factory=dict)
    kinds: Kinds | None = None
    state: State | None = None
    window: str = "sliding_window"
    expanded: bool = False


def _every(period: int | str, kind: str = SLIDING, usual: int | None = None, first: bool = False) -> Kinds:
    """Full attention in each `period`-th layer (its first, or its last), and `kind` in the others.

    period: a number, or the name of the field that holds it (`usual` if it is absent).
    """

    def kinds(fields: Fields, layers: int) -> list[str]:
        length = fields.get(period) if isinstance(period, str) else period
        length = usual if length is None else length
        if isinstance(length, str) and length and set(length) <= {"L", "G"}:  # EXAONE: "LLLG"
            return [FULL if length[n % len(length)] == "G" else kind for n in range(layers)]
        if not isinstance(length, int) or isinstance(length, bool) or length <= 0:
            raise UnknownCache(f"{period} in config.json is {length!r}, expected a whole number")
        return [FULL if n % length == (0 if first else length - 1) else kind for n in range(layers)]

    return kinds


def _windowed(fields: Fields, layers: int) -> list[str]:
    """Every layer has the window, if there is one."""
    return [SLIDING] * layers


def _late(fields: Fields, layers: int) -> list[str]:
    """The layers from max_window_layers on have a window, if use_sliding_window switches it on (Qwen2, Qwen3)."""
    first = fields.get("max_window_layers")
    if fields.get("use_sliding_window") is False:
        return [FULL] * layers
    if not isinstance(first, int):
        raise UnknownCache("config.json does not say max_window_layers")
    return [SLIDING if n >= first else FULL for n in range(layers)]


def _on_request(fields: Fields, layers: int) -> list[str]:
    """Every layer has the window, if use_sliding_window switches it on (Qwen3-MoE)."""
    return [SLIDING if fields.get("use_sliding_window") else FULL] * layers


def _qwen2_moe(fields: Fields, layers: int) -> list[str]:
    """Layers 0, 2, 4, … before max_window_layers have a window, if use_sliding_window switches it on."""
    last = fields.get("max_window_layers")
    if not fields.get("use_sliding_window"):
        return [FULL] * layers
    if not isinstance(last, int):
        raise UnknownCache("config.json does not say max_window_layers")
    return [SLIDING if n % 2 == 0 and n < last else FULL for n in range(layers)]


def _llama4(fields: Fields, layers: int) -> list[str]:
    """Layers with rotary positions attend to chunks (`no_rope_layers` holds 1 for them)."""
    rotary = fields.get("no_rope_layers")
    if not rotary:
        return _every("no_rope_layer_interval", CHUNKED, 4)(fields, layers)
    return [CHUNKED if flag else FULL for flag in fields.numbers("no_rope_layers")]


def _exaone4(fields: Fields, layers: int) -> list[str]:
    if fields.get("sliding_window") is None:
        return [FULL] * layers
    return _every("sliding_window_pattern", usual=4)(fields, layers)


def _gemma4(fields: Fields, layers: int) -> list[str]:
    return [*_every(6)(fields, layers)[:-1], FULL]  # the last layer always attends to everything


def _jamba(fields: Fields, layers: int) -> list[str]:
    period, offset = fields.count("attn_layer_period"), fields.get("attn_layer_offset")
    return [FULL if n % period == offset else LINEAR for n in range(layers)]


def _listed(name: str, kind: str = FULL, other: str = LINEAR, base: int = 0) -> Kinds:
    """The layers whose numbers a field lists are of `kind`, the rest of `other`. base: the first layer's number."""

    def kinds(fields: Fields, layers: int) -> list[str]:
        chosen = set(fields.numbers(name)) if fields.get(name) is not None else set()
        return [kind if n + base in chosen else other for n in range(layers)]

    return kinds


def _lfm2(fields: Fields, layers: int) -> list[str]:
    if fields.get("full_attn_idxs") is None:
        return [FULL] * layers
    return _listed("full_attn_idxs")(fields, layers)


def _nemotron_h(fields: Fields, layers: int) -> list[str]:
    """One character per layer: M for Mamba-2, * for attention, - and E for layers that keep nothing."""
    pattern = fields.get("hybrid_override_pattern")
    words = {"M": LINEAR, "*": FULL, "-": NOTHING, "E": NOTHING}
    if not isinstance(pattern, str) or not set(pattern) <= set(words):
        raise UnknownCache("config.json names no kinds of layers (layers_block_type, hybrid_override_pattern)")
    return [words[letter] for letter in pattern]


def _kimi_linear(fields: Fields, layers: int) -> list[str]:
    inner = fields.get("linear_attn_config")
    if isinstance(inner, dict) and "full_attn_layers" in inner:
        return _listed("full_attn_layers", base=1)(Fields(inner, {}), layers)
    return [FULL if n and n % 4 == 0 else LINEAR for n in range(layers)]


def _minimax(fields: Fields, layers: int) -> list[str]:
    """MiniMax-Text-01: `attn_type_list` holds 1 for full attention, 0 for linear."""
    if fields.get("attn_type_list") is not None:
        return [FULL if flag else LINEAR for flag in fields.numbers("attn_type_list")]
    return [FULL if n % 2 == 0 else LINEAR for n in range(layers)]


def _cohere2_moe(fields: Fields, layers: int) -> list[str]:
    dense = fields.get("first_k_dense_replace") or 0
    if not isinstance(dense, int) or not 0 <= dense <= layers:
        raise UnknownCache("first_k_dense_replace in config.json is not a number of layers")
    first = _every("prefix_dense_sliding_window_pattern", usual=1)(fields, dense)
    return first + _every("sliding_window_pattern", usual=4)(fields, layers - dense)


# --- states that do not grow (vLLM, model_executor/layers/mamba/mamba_utils.py MambaStateShapeCalculator) -------------


def _mamba2(inner: Callable[[Fields], int], groups: str, heads: str, dim: str, state: str, kernel: str) -> State:
    """(kernel − 1) inputs of the convolution over inner + 2 · groups · state channels; heads × dim × state."""

    def size(fields: Fields) -> tuple[int, int]:
        channels, wide = inner(fields), fields.count(state)
        number = fields.count(heads)
        per_head = channels // number if fields.get(dim) in (None, "auto") else fields.count(dim)
        conv = (fields.count(kernel) - 1) * (channels + 2 * fields.count(groups) * wide)
        return conv, number * per_head * wide

    return size


def _expanded(name: str, usual: int = 2, given: str = "") -> Callable[[Fields], int]:
    """`given` if the config has it; else the field `name` × hidden_size."""

    def inner(fields: Fields) -> int:
        if given and fields.get(given) is not None:
            return fields.count(given)
        factor = fields.get(name)
        factor = usual if factor is None else factor
        if not isinstance(factor, (int, float)) or not 0 < factor < 1000:
            raise UnknownCache(f"{name} in config.json is {factor!r}, expected a factor")
        return int(factor * fields.count("hidden_size"))

    return inner


def _mamba1(inner: Callable[[Fields], int], state: str, kernel: str) -> State:
    return lambda fields: (
        (fields.count(kernel) - 1) * inner(fields),
        inner(fields) * fields.count(state),
    )


def _gated_delta_net(fields: Fields) -> tuple[int, int]:
    keys, values = fields.count("linear_num_key_heads"), fields.count("linear_num_value_heads")
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    channels = 2 * keys * key_dim + values * value_dim
    return (fields.count("linear_conv_kernel_dim") - 1) * channels, values * key_dim * value_dim


def _kimi_delta(fields: Fields) -> tuple[int, int]:
    inner = fields.get("linear_attn_config")
    source = Fields(inner, {}) if isinstance(inner, dict) else fields
    heads, dim = source.count("num_heads", "linear_num_heads"), source.count("head_dim", "linear_head_dim")
    kernel = source.count("short_conv_kernel_size", "linear_conv_kernel_dim")
    return (kernel - 1) * 3 * heads * dim, heads * dim * dim


def _lightning(fields: Fields) -> tuple[int, int]:
    heads = fields.count("num_attention_heads")
    dim = fields.optional("head_dim") or fields.count("hidden_size") // heads
    return 0, heads * dim * dim


def _short_convolution(fields: Fields) -> tuple[int, int]:
    return (fields.count("conv_L_cache") - 1) * fields.count("hidden_size"), 0


_FALCON_H1 = _mamba2(_expanded("mamba_expand", given="mamba_d_ssm"), "mamba_n_groups", "mamba_n_heads", "mamba_d_head",
                     "mamba_d_state", "mamba_d_conv")  # fmt: skip
_BAMBA = _mamba2(_expanded("mamba_expand"), "mamba_n_groups", "mamba_n_heads", "mamba_d_head", "mamba_d_state",
                 "mamba_d_conv")  # fmt: skip
_NEMOTRON_H = _mamba2(lambda fields: fields.count("mamba_num_heads") * fields.count("mamba_head_dim"), "n_groups",
                      "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "conv_kernel")  # fmt: skip
_MAMBA_2 = _mamba2(_expanded("expand"), "n_groups", "num_heads", "head_dim", "state_size", "conv_kernel")
_MAMBA_1 = _mamba1(_expanded("expand", given="intermediate_size"), "state_size", "conv_kernel")
_JAMBA = _mamba1(_expanded("mamba_expand"), "mamba_d_state", "mamba_d_conv")


def _row(
    layers: int, hidden: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None,
    kinds: Kinds | None = None, state: State | None = None, window_field: str = "sliding_window", **more: Any,
) -> Family:  # fmt: skip
    """Return a row: the usual number of layers, hidden size, heads, KV heads (None: heads) and head_dim.

    head_dim None: hidden_size / heads.
    """
    usual: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    usual |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    return Family({key: value for key, value in (usual | more).items() if value != -1}, kinds, state, window_field)


_NAMED = Family({"num_key_value_heads": None, "head_dim": None})  # remote code: config.json must name the rest
_GPT = Family({"num_key_value_heads": None, "head_dim": None})
_QWEN2: dict[str, Any] = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_QWEN2_VL: dict[str, Any] = {**_QWEN2, "max_window_layers": 80}
_MLA: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_GDN: dict[str, Any] = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
_DSA: dict[str, Any] = {**_MLA, "index_head_dim": 128}

FAMILIES: dict[str, Family] = {
    # Every layer attends to all tokens.
    "llama": _row(32, 4096, 32),
    "apertus": _row(32, 4096, 32),
    "arcee": _row(32, 2560, 32),
    "aria_text": _row(32, 4096, 32),
    "bitnet": _row(30, 2560, 20, 5),
    "cohere": _row(40, 8192, 64),
    "diffllama": _row(16, 2048, 32),
    "ernie4_5": _row(18, 1024, 16, 2, 128),
    "ernie4_5_moe": _row(28, 2560, 20, 4),
    "ernie4_5_vl_moe_text": _row(28, 2560, 20, 4),
    "flex_olmo": _row(32, 4096, 32),
    "gemma": _row(28, 3072, 16, 16, 256),
    "glm": _row(40, 4096, 32, 2, 128),
    "glm4": _row(40, 4096, 32, 2, 128),
    "glm4_moe": _row(46, 4096, 96, 8),
    "glm4v_text": _row(40, 4096, 32, 2),
    "glm4v_moe_text": _row(46, 4096, 96, 8),
    "glm_ocr_text": _row(16, 1024, 16, 8),
    "granite": _row(32, 4096, 32),
    "granitemoe": _row(32, 4096, 32),
    "granitemoeshared": _row(32, 4096, 32),
    "helium": _row(24, 2560, 20, 20, 128),
    "hunyuan_v1_dense": _row(32, 4096, 32),
    "hunyuan_v1_moe": _row(32, 4096, 32),
    "hy_v3": _row(80, 4096, 64, 8, 128),
    "hyperclovax": _row(32, 4096, 32),
    "jais2": _row(32, 3328, 26),
    "minimax_m2": _row(62, 3072, 48, 8, 128),
    "nanochat": _row(12, 768, 6),
    "nemotron": _row(32, 6144, 48),
    "olmo": _row(32, 4096, 32),
    "olmo2": _row(32, 4096, 32),
    "olmoe": _row(16, 2048, 16),
    "paddleocr_vl_text": _row(18, 1024, 16, 2, 128),
    "persimmon": _row(36, 4096, 64),
    "phi": _row(24, 2048, 32),
    "qwen3_vl_text": _row(32, 4096, 32, 32, 128),
    "qwen3_vl_moe_text": _row(24, 2048, 16, 16),
    "seed_oss": _row(64, 4096, 80, 8, 128),
    "solar_open": _row(48, 4096, 64, 8, 128),
    "stablelm": _row(32, 2560, 32, 32),
    "gpt2": _GPT, "gptj": _GPT, "gpt_neox": _GPT, "opt": _GPT, "codegen": _GPT, "bloom": _GPT,
    # Remote code, or a table of published configs alone.
    "baichuan": _NAMED, "bailing_moe": _NAMED, "deepseek": _NAMED, "internlm": _NAMED,
    "internlm2": _NAMED, "minicpm": _NAMED, "molmo": _NAMED, "orion": _NAMED, "xverse": _NAMED,
    # The published code and Transformers 5.24 may disagree on what a config leaves out
    "exaone": Family({"head_dim": None}), "internlm3": Family({}),
    # All layers have a window, where there is one.
    "mistral": _row(32, 4096, 32, 8, kinds=_windowed, sliding_window=4096),
    "ministral": _row(32, 4096, 32, 8, kinds=_windowed, sliding_window=4096),
    "ministral3": _row(34, 4096, 32, 8, 128, kinds=_windowed, sliding_window=None),
    "mixtral": _row(32, 4096, 32, 8, kinds=_windowed, sliding_window=None),
    "phi3": _row(32, 3072, 32, kinds=_windowed, sliding_window=None),
    "phi4_multimodal": _row(32, 3072, 32, 8, kinds=_windowed, sliding_window=None),
    "phi4mm": Family({"num_key_value_heads": None, "head_dim": None, "sliding_window": None}, _windowed),
    "phimoe": _row(32, 4096, 32, 8, kinds=_windowed, sliding_window=None),
    "starcoder2": _row(30, 3072, 24, 2, kinds=_windowed, sliding_window=None),
    # Some have one where it is switched on.
    "qwen2": _row(32, 4096, 32, 32, kinds=_late, **_QWEN2),
    "qwen2_moe": _row(24, 2048, 16, 16, kinds=_qwen2_moe, **_QWEN2),
    "qwen3": _row(32, 4096, 32, 32, 128, kinds=_late, **_QWEN2),
    "qwen3_moe": _row(24, 2048, 32, 4, kinds=_on_request, sliding_window=4096, use_sliding_window=False),
    "qwen2_vl": _row(80, 8192, 64, 8, kinds=_late, **_QWEN2_VL),
    "qwen2_vl_text": _row(80, 8192, 64, 8, kinds=_late, **_QWEN2_VL),
    "qwen2_5_vl": _row(80, 8192, 64, 8, kinds=_late, **_QWEN2_VL),
    "qwen2_5_vl_text": _row(80, 8192, 64, 8, kinds=_late, **_QWEN2_VL),
    "dots1": _row(62, 4608, 32, 32, kinds=_late, sliding_window=4096, max_window_layers=62),
    "smollm3": _row(36, 2048, 16, 4, kinds=_on_request, sliding_window=None, use_sliding_window=False),
    # Windows in most layers.
    "afmoe": _row(32, 2048, 16, None, 128, kinds=_every("global_attn_every_n_layers", usual=4), sliding_window=1024),
    "cohere2": _row(40, 8192, 64, kinds=_every("sliding_window_pattern", usual=4), sliding_window=4096),
    "cohere2_moe": _row(40, 8192, 64, None, 128, kinds=_cohere2_moe, sliding_window=4096),
    "cwm": _row(64, 6144, 48, 8, 128, kinds=_every(4, first=True), sliding_window=8192),
    "exaone4": _row(32, 4096, 32, 32, kinds=_exaone4, sliding_window=4096),
    "exaone_moe": _row(32, 4096, 32, 32, kinds=_exaone4, sliding_window=4096),
    "gemma2": _row(26, 2304, 8, 4, 256, kinds=_every(2), sliding_window=4096),
    "gemma3_text": _row(26, 2304, 8, 4, 256, kinds=_every("sliding_window_pattern", usual=6), sliding_window=4096),
    "gemma3n_text": _row(35, 2048, 8, 2, 256, kinds=_every(5), sliding_window=512, num_kv_shared_layers=15),
    "gemma4_text": _row(30, 2304, 8, 4, 256, kinds=_gemma4, sliding_window=512, num_kv_shared_layers=0,
                        global_head_dim=512, num_global_key_value_heads=None, attention_k_eq_v=False),
    "gpt_oss": _row(36, 2880, 64, 8, 64, kinds=_every(2), sliding_window=128),
    "granite_swa": _row(24, 2560, 20, 4, kinds=_every(4, first=True), sliding_window=128),
    "llama4_text": _row(48, 5120, 40, 8, 128, kinds=_llama4, window_field="attention_chunk_size",
                        attention_chunk_size=8192),
    "olmo3": _row(32, 4096, 32, kinds=_every(4), sliding_window=4096),
    "vaultgemma": _row(26, 2304, 8, 4, 256, kinds=_every(2), sliding_window=4096),
    # A latent per token (MLA).
    "deepseek_v2": _row(32, 4096, 32, **_MLA),
    "deepseek_v3": _row(61, 7168, 128, 128, **_MLA),
    "kimi_k2": Family({"num_key_value_heads": None, "head_dim": None, "kv_lora_rank": None}),
    "axk1": _row(61, 7168, 64, 64, **_MLA),
    "deepseek_v32": _row(61, 7168, 128, 128, 64, **_DSA),
    "glm4_moe_lite": _row(47, 2048, 20, 20, **_MLA),
    "glm_moe_dsa": _row(78, 6144, 64, 64, 64, **_DSA),
    # vLLM and llama.cpp have no latent attention for it (vllm/model_executor/models/minicpm3.py)
    "minicpm3": replace(_row(62, 2560, 40, 40, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32),
                        expanded=True),
    "mistral4": _row(36, 4096, 32, 32, kv_lora_rank=256, qk_rope_head_dim=64),
    "youtu": _row(32, 2048, 16, 16, **_MLA),
    # Linear attention, Mamba and convolutions.
    "bamba": _row(32, 4096, 32, 8, kinds=_listed("attn_layer_indices"), state=_BAMBA, mamba_expand=2,
                  mamba_n_groups=1, mamba_n_heads=128, mamba_d_head="auto", mamba_d_state=256, mamba_d_conv=4),
    "falcon_h1": _row(32, 4096, 32, 8, kinds=lambda fields, layers: [HYBRID] * layers, state=_FALCON_H1,
                      mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_d_head="auto", mamba_d_state=256,
                      mamba_d_conv=4, mamba_d_ssm=1024),
    "granitemoehybrid": _row(32, 4096, 32, kinds=lambda fields, layers: [LINEAR] * layers, state=_BAMBA,
                             mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_d_head="auto",
                             mamba_d_state=256, mamba_d_conv=4),
    "jamba": _row(32, 4096, 32, 8, kinds=_jamba, state=_JAMBA, attn_layer_period=8, attn_layer_offset=4,
                  mamba_expand=2, mamba_d_state=16, mamba_d_conv=4),
    "kimi_linear": _row(27, 2304, 32, 32, kinds=_kimi_linear, state=_kimi_delta, **_MLA),
    "lfm2": _row(32, 2560, 32, 8, kinds=_lfm2, state=_short_convolution, conv_L_cache=3),
    "lfm2_moe": _row(32, 2048, 32, 8, state=_short_convolution, conv_L_cache=3),
    "minimax": _row(32, 4096, 32, 8, kinds=_minimax, state=_lightning),
    "minimax_text_01": Family({"num_key_value_heads": None, "head_dim": None}, _minimax, _lightning),
    "nemotron_h": _row(-1, 4096, 32, 8, 128, kinds=_nemotron_h, state=_NEMOTRON_H, n_groups=8, mamba_num_heads=128,
                       mamba_head_dim=64, ssm_state_size=128, conv_kernel=4),
    "olmo_hybrid": _row(32, 3840, 30, kinds=_every(4, LINEAR), state=_gated_delta_net, linear_conv_kernel_dim=4),
    "qwen3_next": _row(48, 2048, 16, 2, 256, kinds=_every("full_attention_interval", LINEAR, 4),
                       state=_gated_delta_net, **_GDN),
    "qwen3_5_text": _row(32, 4096, 16, 4, 256, kinds=_every("full_attention_interval", LINEAR, 4),
                         state=_gated_delta_net, **_GDN),
    "qwen3_5_moe_text": _row(40, 2048, 16, 2, 256, kinds=_every("full_attention_interval", LINEAR, 4),
                             state=_gated_delta_net, **_GDN),
    "mamba": Family({"conv_kernel": 4, "state_size": 16, "expand": 2}, lambda f, layers: [LINEAR] * layers, _MAMBA_1),
    "falcon_mamba": Family({"conv_kernel": 4, "state_size": 16, "expand": 2}, lambda f, layers: [LINEAR] * layers,
                           _MAMBA_1),
    "mamba2": Family({"conv_kernel": 4, "state_size": 128, "expand": 2, "n_groups": 8, "num_heads": 128,
                      "head_dim": 64}, lambda f, layers: [LINEAR] * layers, _MAMBA_2),
}  # fmt: skip
