"""Both ExLlama adapters from loading to the record, on stand-ins for the engines, without a GPU and ExLlama."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.models.exllama.v3.loading import model_config
from tests.conftest import make_llama
from tests.models.exllama.stand_ins import adapter_module, install_exllamav2, install_exllamav3
from tests.models.exllama.test_exllama import CHOICES, QUESTION, assert_like, generation, pairs
from tests.models.test_adapters import adapter_scores, assert_scores_equal_transformers, windows

pytestmark = pytest.mark.engine

CLASSES = {"v2": "ExLlamaV2Model", "v3": "ExLlamaV3"}


@pytest.fixture(params=["v2", "v3"])
def adapter(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yields the adapter's class, on a stand-in for its engine."""
    {"v2": install_exllamav2, "v3": install_exllamav3}[request.param](monkeypatch)
    with adapter_module(request.param, "adapter") as module:
        yield getattr(module, CLASSES[request.param])


def test_scores_and_texts_equal_hf(adapter: Any, tiny_llama: Path) -> None:
    stock = get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")
    model = adapter(str(tiny_llama), cache_tokens=8192)
    assert_scores_equal_transformers(model, tiny_llama)
    requests = pairs(*((f"{QUESTION}{n}", c) for n in ("", " still") for c in CHOICES))
    prompts = [generation("Iceland is", max_gen_toks=12), generation("A volcano", max_gen_toks=5)]
    expected = stock.loglikelihood(requests), stock.generate_until(prompts)
    for _ in range(3):  # scoring and generation may use the same pages of the cache
        assert_like(model.loglikelihood(requests), expected[0])
        assert model.generate_until(prompts) == expected[1]


def test_record_names_kernel_cache_and_attention(adapter: Any, tiny_llama: Path) -> None:
    v2 = adapter.engine_name == "exllamav2"
    facts = adapter(str(tiny_llama), cache_tokens=1000, cache_bits=4).get_model_info()["quantization"]
    assert (facts["engine"], facts["engine_version"]) == (adapter.engine_name, "0.3.2" if v2 else "1.6.5")
    assert (facts["kernel"], facts["kv_cache_dtype"]) == ("fp16", "q4")
    assert facts["kv_bytes_per_token"] == round(2 * 2 * 2 * 16 * 2 * 9 / 32)  # of float16, and the groups' scales
    assert [note for note in facts["notes"] if "attention" in note] == (["attention: torch SDPA"] if v2 else [])


def test_quantized_cache_is_not_used_for_scoring(adapter: Any, tiny_llama: Path) -> None:
    """ExLlamaV2 scores with other caches; in ExLlamaV3, choices do not share a context then."""
    model = adapter(str(tiny_llama), cache_tokens=1024, cache_bits=4)
    assert model.engine.shares == (adapter.engine_name == "exllamav2")
    stock = get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")
    requests = pairs(*((QUESTION, c) for c in CHOICES))
    assert_like(model.loglikelihood(requests), stock.loglikelihood(requests))


def test_generation_without_a_cache_is_an_error(adapter: Any, tiny_llama: Path) -> None:
    model = adapter(str(tiny_llama), cache_tokens=0)
    adapter_scores(model, windows())
    with pytest.raises(UserError, match="cache_tokens=0 leaves no KV cache to generate with"):
        model.generate_until([generation("Iceland is")])


def test_wrong_arguments_are_errors(adapter: Any, tiny_llama: Path) -> None:
    v2 = adapter.engine_name == "exllamav2"
    for arguments, words in (
        ({"cache_bits": 5 if v2 else 9}, "cache_bits="),
        ({"device": "cpu"}, "runs on GPUs only"),
        ({"nonsense": 1}, f"nonsense=1 is not an argument of {adapter.engine_name}"),
        ({"tensor_parallel": True} if v2 else {"override_tensors": "nowhere.yaml"}, "tensor_parallel|cannot be read"),
        ({"cache_bits": "8/4"} if v2 else {"cache_bits": "8/1"}, "cache_bits='8/[41]'"),
    ):
        with pytest.raises(UserError, match=words):
            adapter(str(tiny_llama), cache_tokens=512, **arguments)


def test_failed_load_is_a_user_error_with_the_reason(
    adapter: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Any, *arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("Insufficient VRAM in split for model and cache")

    package: Any = sys.modules[adapter.engine_name]
    monkeypatch.setattr(package.ExLlamaV2 if adapter.engine_name == "exllamav2" else package.Model, "load", load)
    with pytest.raises(UserError, match=f"out of GPU memory while loading with {adapter.engine_name}"):
        adapter(str(tiny_llama), cache_tokens=512)


def test_architecture_unknown_to_exllamav2_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    install_exllamav2(monkeypatch)
    with (
        adapter_module("v2", "adapter") as module,
        pytest.raises(UserError, match=r"ExLlamaV2 0\.3\.2 does not know OtherForCausalLM"),
    ):
        module.ExLlamaV2Model(str(folder), cache_tokens=512)


def test_override_tensors_takes_tensors_from_other_checkpoints(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "override.yaml"
    sources = [{"id": 4, "model_dir": "/models/4.0"}, {"id": 6, "model_dir": "/models/6.0"}]
    overrides = [{"key": "*.down_proj", "source": 6}, {"key": "*.q_proj", "source": 4}, {"key": "lm_head", "source": 6}]
    file.write_text(json.dumps({"sources": sources, "overrides": overrides}))  # JSON is YAML
    install_exllamav3(monkeypatch)
    config = model_config(tiny_llama, str(file))
    assert config.stc.original == "the checkpoint's own tensors"
    assert config.stc.overrides == [(["*.down_proj", "lm_head"], "/models/6.0"), (["*.q_proj"], "/models/4.0")]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_missing_engine_is_an_error_at_import(version: str) -> None:
    with (
        pytest.raises(MissingEngineError, match=rf"exllama{version} (is not installed|needs a GPU)"),
        adapter_module(version, "adapter"),
    ):
        pass
