"""Specs of compare_q's load functions `transformers`, `anyprecision` and `qtip`, on tiny checkpoints of each format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compare.cli import main
from compare.results.reading import read_results
from tests.conftest import make_llama
from tests.decoding.packers import quantized_checkpoint
from tests.models.hf.tiny_checkpoints import MAKERS, missing_packages

# label: (load function, family in the result), as in ExLlamaV3's eval/spec
ENTRIES = {
    "aqlm": ("transformers", "AQLM"),
    "vptq": ("transformers", "VPTQ"),
    "anyprec": ("anyprecision", "Any-Precision"),
    "qtip": ("qtip", "QTIP"),
    "awq": ("transformers", "AWQ"),
    "gptq": ("transformers", "GPTQ"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint per format whose packages are installed, and a data spec."""
    root = tmp_path_factory.mktemp("formats")
    dense = make_llama(root / "dense", "float16")
    for kind in ENTRIES:
        if kind not in MAKERS:
            quantized_checkpoint(Path(shutil.copytree(dense, root / kind)), kind)
        elif not missing_packages(kind):
            MAKERS[kind][0](dense, root / kind)
    data = {"tokenize_fn": "transformers", "tokenizer_dir": "dense", "dataset": "sample", "eval_len": 64,
            "eval_stride": 64, "max_rows": 2}  # fmt: skip
    (root / "data.json").write_text(json.dumps(data))
    return root


def spec(folder: Path, kinds: list[str]) -> list[str]:
    """Writes a model spec of these kinds; returns the arguments of `compare run`."""
    entries = [
        {"load_fn": ENTRIES[kind][0], "fwd_fn": ENTRIES[kind][0], "label": kind, "model_dir": kind} for kind in kinds
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    return ["run", "-d", f"{folder}/data.json", "-m", f"{folder}/models.json", "--results", f"{folder}/results"]


def made(folder: Path) -> list[str]:
    return [kind for kind in ENTRIES if (folder / kind).is_dir()]


@pytest.mark.engine
def test_dry_run_shows_the_command_of_each_format(folder: Path, capsys: Any) -> None:
    kinds = made(folder)
    assert main([*spec(folder, kinds), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("--model hf_quant") == len(kinds)
    for kind in kinds:
        assert f"{folder}/{kind}" in out


@pytest.mark.engine
@pytest.mark.slow
def test_specs_of_formats_run(folder: Path) -> None:
    kinds = ["aqlm", "qtip"]  # one of each load function; test_checkpoints.py runs the others
    assert main(spec(folder, kinds)) == 0
    records = {record.label: record for record in read_results([folder / "results"]).records}
    assert set(records) == set(kinds)
    for kind, record in records.items():
        found = record.quantization
        assert (found.family, found.kernel, found.dtype) == (ENTRIES[kind][1], "decoded", "float16")
        assert found.layer_bpw is not None
