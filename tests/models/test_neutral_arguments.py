"""Every argument of an engine is in one of two lists: neutral, or one that may change its distributions.

A reference's identity holds the arguments that are not neutral. A new argument of an engine is in neither list, and
fails here until it is in one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from lmeval_ext.divergence.arguments import NEUTRAL, ReferenceArguments
from tests.models.engine_arguments import HF, LLAMA_CPP, VLLM

# Parameters of an adapter's constructor that are not part of a reference's identity: they change token ids and texts
# (which a window's key holds), or which class of Transformers reads the same weights
CONSTRUCTOR = {
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "multimodal",
    "prefix_token_id",
    "think_end_token",
}
# Neutral names that are in no signature: vLLM 0.26 had the first, Transformers' from_pretrained takes the second
IN_NO_SIGNATURE = {"swap_space", "use_safetensors"}


def parameters(*functions: Callable[..., Any]) -> set[str]:
    """Returns the names of the functions' parameters, without self and **keywords."""
    signatures = [inspect.signature(function).parameters.values() for function in functions]
    return {p.name for each in signatures for p in each if p.kind is not p.VAR_KEYWORD} - {"self"}


def hf() -> tuple[type, set[str], frozenset[str]]:
    from lm_eval.models.huggingface import HFLM

    from lmeval_ext.models.hf.adapter import HFQuantized

    return HFQuantized, parameters(HFLM.__init__), HF


def vllm() -> tuple[type, set[str], frozenset[str]]:
    from lmeval_ext.models.vllm.adapter import VLLM as Stock
    from lmeval_ext.models.vllm.adapter import VLLMQuantized

    engine = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    fields = {field.name for field in dataclasses.fields(engine)}
    return VLLMQuantized, fields | parameters(Stock.__init__), VLLM


def llamacpp() -> tuple[type, set[str], frozenset[str]]:
    from lmeval_ext.models.llamacpp.adapter import LlamaCpp

    return LlamaCpp, parameters(importlib.import_module("llama_cpp").Llama.__init__), LLAMA_CPP


@pytest.mark.engine  # signatures come from the engines' own modules
@pytest.mark.parametrize("engine", [hf, vllm, llamacpp], ids=lambda f: f.__name__)
def test_every_engine_argument_is_in_one_list(engine: Callable[[], tuple[Any, set[str], frozenset[str]]]) -> None:
    try:
        adapter, arguments, changing = engine()
    except ImportError as error:
        pytest.skip(str(error))
    neutral = NEUTRAL | adapter.neutral_arguments
    own = parameters(adapter.__init__)
    assert own <= neutral | CONSTRUCTOR
    assert arguments - own - neutral - changing == set()
    assert neutral & changing == set()
    assert adapter.neutral_arguments - arguments - own - IN_NO_SIGNATURE == set()  # no misspelt name


def test_every_exllama_argument_is_in_one_list() -> None:
    """The engines' own arguments are those of `load`, read from the source, because the engines need a GPU."""
    from lmeval_ext.models.exllama.adapter import ExLlamaLM

    assert parameters(ExLlamaLM.__init__) <= NEUTRAL | ExLlamaLM.neutral_arguments | CONSTRUCTOR
    changing = {"cache_bits", "gpu_split", "override_tensors", "swa_full", "tensor_parallel", "tp_backend"}
    for version in ("v2", "v3"):
        assert load_arguments(version) <= NEUTRAL | ExLlamaLM.neutral_arguments | changing


def load_arguments(version: str) -> set[str]:
    """Returns the names of the arguments of an ExLlama adapter's `load`, from its source."""
    import ast

    from tests.conftest import ROOT

    file = ROOT / "lmeval_ext" / "models" / "exllama" / version / "adapter.py"
    loads = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef) and n.name == "load"]
    return {argument.arg for argument in loads[0].args.args} - {"self"}


def test_only_neutral_arguments_are_left_out_of_the_identity() -> None:
    taken = ReferenceArguments.take({"pretrained": "x", "dtype": "float16", "n_batch": 4}, frozenset({"n_batch"}))
    assert taken.others == {"dtype": "float16"}
