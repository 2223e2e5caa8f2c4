"""Words of llama.cpp's own options mean what they mean there; others give one line, and llama.cpp never aborts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from tests.models.llamacpp import tiny_gguf

pytestmark = pytest.mark.engine
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.llama(tmp_path_factory.mktemp("gguf") / "llama.gguf")


def translated(**arguments: Any) -> dict[str, Any]:
    from lmeval_ext.models.llamacpp.arguments import translated

    return translated(arguments)


def refusal(**arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        translated(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Words of common_arg_utils::is_truthy and is_falsey in llama.cpp's common/arg.cpp, and what the harness makes of them
ON, OFF = ("on", "enabled", "true", "1", True, 1, "ON"), ("off", "disabled", "false", "0", False, 0, "Off")


def boolean_arguments() -> list[str]:
    """All arguments of `llama_cpp.Llama` that are on or off, from its signature."""
    import inspect

    import llama_cpp

    annotations = {
        name: str(p.annotation) for name, p in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    }
    return [name for name, kind in annotations.items() if "bool" in kind and "Union" not in kind]


def test_every_boolean_argument_takes_llama_cpps_words() -> None:
    names = set(boolean_arguments()) - {"verbose", "vocab_only", "embedding"}
    assert {"flash_attn", "swa_full", "use_mmap", "use_mlock", "offload_kqv", "op_offload", "logits_all"} <= names
    for name in names:
        for words, value in ((ON, True), (OFF, False)):
            for word in words:
                assert translated(**{name: word})[name] == value, (name, word)
        for word in ("no", "yes", "maybe", 2, 0.5, "None", ""):
            assert f"{name}={word!r}: expected one of" in refusal(**{name: word})


@pytest.mark.parametrize(("word", "kind"), [("off", 0), ("on", 1), ("auto", -1), (True, 1), (False, 0), (-1, -1)])
def test_flash_attention_reaches_the_context(model_file: Path, word: Any, kind: int) -> None:
    """Numbers of llama_flash_attn_type in llama.h."""
    model = get_model("llamacpp")(pretrained=str(model_file), max_length=64, flash_attn=word)
    assert model.llama.context_params.flash_attn_type == kind


def test_constant_of_flash_attention_is_back_after_loading(model_file: Path) -> None:
    import llama_cpp

    get_model("llamacpp")(pretrained=str(model_file), max_length=64, flash_attn="auto")
    assert llama_cpp.llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED == 1


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("rope_scaling_type", "yarn", 2),
        ("rope_scaling_type", "none", 0),
        ("rope_scaling_type", 1, 1),
        ("pooling_type", "mean", 1),
        ("split_mode", "row", 2),
        ("attention_type", "causal", 0),
        ("numa", "isolate", 2),
        ("numa", False, 0),
        ("type_k", "q8_0", 8),
        ("type_k", "BF16", 30),
        ("type_k", 8, 8),
        ("n_gpu_layers", "all", -1),
        ("n_gpu_layers", "12", 12),
        ("tensor_split", "3/1", [3.0, 1.0]),
        ("tensor_split", [3, 1], [3.0, 1.0]),
        ("kv_overrides", "llama.context_length=int:64", {"llama.context_length": 64}),
        ("rope_freq_base", "500000", 500000.0),
        ("n_batch", "32", 32),
    ],
)
def test_word_of_an_option_has_its_value(name: str, word: Any, value: Any) -> None:
    """Values of the enums in llama.h and ggml.h."""
    assert translated(**{name: word})[name] == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rope_scaling_type": "ntk"}, "rope_scaling_type='ntk': expected one of"),
        ({"rope_scaling_type": 9}, "yarn"),
        ({"type_k": "q4_k"}, "type_k='q4_k': expected one of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1"),
        ({"type_v": 12}, "type_v=12: expected one of f32"),
        ({"type_v": "q8_0"}, "add flash_attn=on"),
        ({"type_v": "q8_0", "flash_attn": "off"}, "add flash_attn=on"),
        ({"split_mode": "tensor"}, "add flash_attn=on"),
        ({"attention_type": "non-causal"}, "non-causal"),
        ({"n_threads": "four"}, "n_threads='four': expected a whole number"),
        ({"n_threads": -1}, "at least 1"),
        ({"n_batch": 0}, "at least 1"),
        ({"n_ubatch": 1.5}, "whole number"),
        ({"n_gpu_layers": "most"}, "or all, or auto"),
        ({"rope_freq_base": "high"}, "expected a number"),
        ({"kv_overrides": "llama.context_length=64"}, "KEY=TYPE:VALUE"),
        ({"kv_overrides": "llama.context_length=int:x"}, "KEY=TYPE:VALUE"),
        ({"vocab_only": "on"}, "scores nothing"),
        ({"embedding": True}, "logits"),
        ({"chat_format": "llama-2"}, "template"),
        ({"model_path": "x.gguf"}, "pretrained="),
    ],
)
def test_value_that_llama_cpp_does_not_take_is_refused(arguments: dict[str, Any], words: str) -> None:
    assert words in refusal(**arguments)


def test_quantized_values_are_taken_with_flash_attention() -> None:
    for word in ("on", "auto"):
        assert translated(type_v="q8_0", flash_attn=word)["type_v"] == 8


def test_every_cache_type_that_is_taken_scores(tmp_path: Path) -> None:
    """No abort; the type acts on the scores of a window. Heads of 32 values."""
    from lmeval_ext.models.llamacpp.arguments import CACHE_TYPES
    from lmeval_ext.requests import window_request

    path = tiny_gguf.llama(tmp_path / "wide.gguf", wide=True)
    ids = [5, 9, 70, 40, 31, 200, 17]
    scores = {}
    for name in CACHE_TYPES:
        types = {"type_k": name, "type_v": name, "flash_attn": "on"}
        model = get_model("llamacpp")(pretrained=str(path), max_length=64, **ONE_THREAD, **types)
        assert model.label == f"wide KV {name}"
        assert model.get_model_info()["quantization"]["kv_cache_dtype"] == name.upper()
        (found,) = model._loglikelihood_tokens([window_request("", ids, 1, {}, (None, None, None))])
        scores[name] = found.logprobs
    for name in ("f16", "bf16", "q8_0"):
        assert scores[name] == pytest.approx(scores["f32"], abs=0.5 if name == "q8_0" else 0.05), name
    # llama.cpp's flash attention reads a float32 cache as float16
    assert len({tuple(found) for found in scores.values()}) == len(CACHE_TYPES) - 1
    assert np.isfinite(list(scores.values())).all()


def test_label_names_cache_types_that_were_given(model_file: Path) -> None:
    for given, label in (({}, "llama"), ({"type_k": "bf16"}, "llama K bf16 V f16"), ({"type_v": 1}, "llama KV f16")):
        assert get_model("llamacpp")(pretrained=str(model_file), max_length=64, **given).label == label


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_blocks_that_do_not_divide_a_head_are_refused(model_file: Path, flash_attn: str) -> None:
    """Heads of 16 values, blocks of 32: llama.cpp aborts without flash attention."""
    with pytest.raises(UserError, match=r"type_k=q8_0: its blocks of 32 do not divide the 16 values of a head"):
        get_model("llamacpp")(pretrained=str(model_file), type_k="q8_0", flash_attn=flash_attn)


def test_block_type_of_a_head_of_unknown_size_is_refused() -> None:
    from lmeval_ext.models.llamacpp.loading import GGUFModel

    settings = translated(type_k="q8_0")
    with pytest.raises(UserError, match="does not say how many values a head has"):
        GGUFModel("x.gguf", "deci", {"embedding_length": 64}, frozenset()).check(settings, 64)
    GGUFModel("x.gguf", "mamba", {"embedding_length": 64, "attention.head_count": 0}, frozenset()).check(settings, 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"verbose": "perhaps"}, "verbose='perhaps'"),
        ({"trust_remote_code": "no"}, "trust_remote_code='no'"),
        ({"add_bos_token": "no"}, "add_bos_token='no'"),
        ({"max_length": "long"}, "max_length='long': expected a whole number"),
        ({"max_length": -1}, "max_length=-1: expected at least 0"),
        ({"n_ctx": "64", "max_length": 128}, "two names of one argument"),
    ],
)
def test_own_arguments_of_the_adapter_are_checked_too(model_file: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        get_model("llamacpp")(pretrained=str(model_file), **arguments)
    assert words in str(caught.value)


def test_off_is_off_for_the_adapters_own_switches(model_file: Path) -> None:
    model = get_model("llamacpp")(
        pretrained=str(model_file), max_length="64", verbose="off", trust_remote_code="off", add_bos_token="off"
    )
    assert model.add_bos_token is False
    assert model.max_length == 64


def test_context_of_0_is_the_models_own(model_file: Path) -> None:
    assert get_model("llamacpp")(pretrained=str(model_file), n_ctx=0).max_length == 2048
