"""Model arguments in the words of llama.cpp's own command line, as the values that `llama_cpp.Llama` takes.

`llama_cpp.Llama` takes any non-empty word for true, and passes numbers that llama.cpp does not know on to it. Kinds of
arguments come from its signature; `CHOICES` has the words of llama.cpp's options (common/arg.cpp) for its enums.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.binding import llama_cpp

# common_arg_utils::is_truthy and is_falsey in common/arg.cpp
TRUE, FALSE = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0")
SWITCH = dict.fromkeys(FALSE, False) | dict.fromkeys(TRUE, True)
# kv_cache_types in common/arg.cpp: llama.cpp aborts on others. Names are those of ggml
CACHE_TYPES = {
    name: int(GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
}
FLASH_ATTENTION = {
    **dict.fromkeys(FALSE, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
    **dict.fromkeys(TRUE, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
    **dict.fromkeys(("auto", "-1"), llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
}
ALL_LAYERS = -1  # what `llama_cpp.Llama` takes for all of them; llama.cpp's own "auto" fits them to the memory
# Argument -> words and what they stand for. A number is taken if it is one of these values.
CHOICES: dict[str, dict[str, int]] = {
    "flash_attn": FLASH_ATTENTION,
    "type_k": CACHE_TYPES,
    "type_v": CACHE_TYPES,
    "split_mode": {
        "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
        "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
        "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
        "tensor": llama_cpp.LLAMA_SPLIT_MODE_TENSOR,
    },
    "rope_scaling_type": {
        "unspecified": llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        "none": llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE,
        "linear": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LINEAR,
        "yarn": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
    },
    "pooling_type": {
        "unspecified": llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED,
        "none": llama_cpp.LLAMA_POOLING_TYPE_NONE,
        "mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
        "cls": llama_cpp.LLAMA_POOLING_TYPE_CLS,
        "last": llama_cpp.LLAMA_POOLING_TYPE_LAST,
        "rank": llama_cpp.LLAMA_POOLING_TYPE_RANK,
    },
    "attention_type": {
        "unspecified": llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        "causal": llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL,
        "non-causal": llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL,
    },
    "numa": {
        **dict.fromkeys(FALSE, llama_cpp.GGML_NUMA_STRATEGY_DISABLED),
        "distribute": llama_cpp.GGML_NUMA_STRATEGY_DISTRIBUTE,
        "isolate": llama_cpp.GGML_NUMA_STRATEGY_ISOLATE,
        "numactl": llama_cpp.GGML_NUMA_STRATEGY_NUMACTL,
    },
}
# Words of arguments that are numbers otherwise
NUMBERS_OR_WORDS = {"n_gpu_layers": {"all": ALL_LAYERS, "auto": ALL_LAYERS}}
# The least value of arguments that count something; llama.cpp aborts or fails below it
LEAST = {"n_threads": 1, "n_threads_batch": 1, "n_batch": 1, "n_ubatch": 1, "n_gpu_layers": ALL_LAYERS, "main_gpu": 0}
# Arguments of `llama_cpp.Llama` that cannot be given here, and why; their default values are accepted
UNUSABLE = {
    "model_path": "pretrained= names the file",
    "vocab_only": "a model without weights scores nothing",
    "embedding": "scores come from logits",
    "lora_base": "llama-cpp-python ignores it; merge the adapter into the model, or give lora_path alone",
    "draft_model": "windows are scored without drafts",
    "chat_handler": "conversations are rendered by the file's template, or by that of tokenizer=",
    "chat_format": "conversations are rendered by the file's template, or by that of tokenizer=",
}


def translated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with words replaced by values of `llama_cpp.Llama`.

    flash_attn becomes a number of llama.cpp's enum. None leaves an argument at its default. Raises UserError for an
    unknown name, and for a value that llama.cpp does not take.
    """
    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    known = {name: p for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY}
    kinds = typing.get_type_hints(llama_cpp.Llama.__init__)
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in UNUSABLE and value not in (None, known[name].default if name in known else None):
            if _switched_off(value):
                continue
            raise UserError(f"{name}={value!r} cannot be given to llamacpp: {UNUSABLE[name]}; leave it out")
        if name not in known and name not in UNUSABLE:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise UserError(f"{name}={value!r} is not an argument of llamacpp; {hint}")
        if value is not None and name not in UNUSABLE:
            values[name] = _value(name, value, kinds.get(name))
    _check_together(values)
    return values


def switch(name: str, value: Any) -> bool:
    """Returns a boolean argument, which may be one of llama.cpp's words. Raises UserError for anything else."""
    return bool(_choice(name, value, {word: int(on) for word, on in SWITCH.items()}))


def count(name: str, value: Any, least: int) -> int:
    """Returns an argument that is a whole number. Raises UserError for anything else, and below `least`."""
    return _number(name, value, int, least)


def _switched_off(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in FALSE


def _value(name: str, value: Any, kind: Any) -> Any:
    """Returns one value. kind: the annotation of the argument in `llama_cpp.Llama`."""
    if name in CHOICES:
        return _choice(name, value, CHOICES[name])
    if name in NUMBERS_OR_WORDS and isinstance(value, str) and value.lower() in NUMBERS_OR_WORDS[name]:
        return NUMBERS_OR_WORDS[name][value.lower()]
    if name in PARSERS:
        return PARSERS[name](name, value)
    kinds = set(typing.get_args(kind)) - {type(None)} or {kind}
    if kinds == {bool}:
        return switch(name, value)
    if kinds in ({int}, {float}):
        return _number(name, value, kinds.pop(), LEAST.get(name))
    return value


def _choice(name: str, value: Any, words: Mapping[str, int]) -> int:
    """Returns what a word stands for; numbers and booleans that are among the values are taken as they are."""
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, bool):  # the harness turns "true" and "false" into booleans
        word = str(value).lower()
        if word in words:
            return words[word]
    elif isinstance(value, int) and value in words.values():
        return value
    raise UserError(f"{name}={value!r}: expected one of {', '.join(words)}")


def _number(name: str, value: Any, kind: type, least: int | None) -> Any:
    """Returns a value as int or float. Raises UserError for a word, a fraction instead of int, and below `least`."""
    try:
        number = kind(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or (kind is int and number != float(value)) or number != number:
        what = "a whole number" if kind is int else "a number"
        words = "".join(f", or {word}" for word in NUMBERS_OR_WORDS.get(name, ()))
        raise UserError(f"{name}={value!r}: expected {what}{words}")
    if least is not None and number < least:
        raise UserError(f"{name}={value!r}: expected at least {least}")
    return number


def _tensor_split(name: str, value: Any) -> list[float]:
    """Returns proportions per device from a list, or from llama.cpp's own spelling: 3,1 or 3/1."""
    if isinstance(value, str):
        parts = value.replace("/", ",").split(",")
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(parts) > llama_cpp.LLAMA_MAX_DEVICES:
        raise UserError(f"{name}={value!r}: expected at most {llama_cpp.LLAMA_MAX_DEVICES} proportions")
    return [float(_number(name, part, float, 0)) for part in parts]


_OVERRIDES: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "bool": lambda text: {"true": True, "false": False}[text], "str": str,
}  # fmt: skip


def _kv_overrides(name: str, value: Any) -> dict[str, Any]:
    """Returns metadata overrides from a dictionary, or from llama.cpp's own spelling: KEY=TYPE:VALUE,…"""
    if isinstance(value, dict):
        return value
    overrides = {}
    for item in str(value).split(","):
        key, equals, rest = item.partition("=")
        kind, colon, text = rest.partition(":")
        try:
            if not (key and equals and colon):
                raise ValueError
            overrides[key] = _OVERRIDES[kind](text)
        except (KeyError, ValueError):
            raise UserError(
                f"{name}={value!r}: expected KEY=TYPE:VALUE, with a TYPE of {', '.join(_OVERRIDES)}; several are "
                "separated by commas"
            ) from None
    return overrides


PARSERS: dict[str, Callable[[str, Any], Any]] = {"tensor_split": _tensor_split, "kv_overrides": _kv_overrides}


def cache_block(number: int | None) -> int:
    """Returns the values per block of a type of the KV cache; 1 for one that is not quantized, and for the default."""
    return 1 if number is None else int(GGML_QUANT_SIZES[GGMLQuantizationType(number)][0])


def cache_label(type_k: int | None, type_v: int | None) -> str:
    """Returns what a model's label says of the types of its KV cache; nothing if both are left at their default."""
    if type_k is None and type_v is None:
        return ""
    words = {number: word for word, number in CACHE_TYPES.items()} | {None: "f16"}  # llama.cpp's default
    k, v = words[type_k], words[type_v]
    return f" KV {k}" if k == v else f" K {k} V {v}"


def _check_together(values: Mapping[str, Any]) -> None:
    """Raises UserError for values that exclude each other or have no meaning for scores."""
    if values.get("attention_type") == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL:
        raise UserError("attention_type=non-causal: a token would be scored with itself in view; leave it out")
    off = values.get("flash_attn", llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED) == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    type_v = values.get("type_v")
    if off and cache_block(type_v) > 1:
        name = next(word for word, number in CACHE_TYPES.items() if number == type_v)
        raise UserError(f"type_v={name}: llama.cpp keeps quantized values with flash attention only; add flash_attn=on")
    if off and values.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_TENSOR:
        raise UserError("split_mode=tensor: llama.cpp needs flash attention for it; add flash_attn=on")
