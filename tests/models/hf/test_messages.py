"""Loading errors name the package that is missing, with its extra, or say plainly that a method is not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.models.hf import methods
from lmeval_ext.models.hf.messages import explain
from lmeval_ext.models.hf.methods import NEEDS, REFUSED
from tests.conftest import ROOT


def checkpoint(folder: Path, method: str) -> str:
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("method", NEEDS)
def test_missing_package_is_named_with_its_extra(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    error = explain(RuntimeError("GPU is required to quantize or run quantize model."), checkpoint(tmp_path, method))
    assert isinstance(error, MissingEngineError)
    extra = NEEDS[method].extra
    assert str(error).endswith(f"pip install 'lmeval-ext[{extra}]'")
    assert NEEDS[method].packages[0].replace("_", "-") in str(error)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("method", REFUSED)
def test_refused_method_says_so_and_names_no_extra(method: str, tmp_path: Path) -> None:
    error = explain(ImportError("needs a GPU"), checkpoint(tmp_path, method))
    assert type(error) is UserError
    assert f"quant_method {method!r} {REFUSED[method]}" in str(error)
    assert "pip install" not in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [ValueError("Unknown quantization type, got odd - supported types are: …"), RuntimeError("requires a GPU")]
)
def test_errors_that_no_package_cures_name_none(error: Exception, tmp_path: Path) -> None:
    text = str(explain(error, checkpoint(tmp_path, "odd")))
    assert "pip install" not in text
    assert "\n" not in text
