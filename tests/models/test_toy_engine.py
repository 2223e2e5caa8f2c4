"""An engine of another package is one file and one entry-point line: perplexity, a reference, tasks, `compare run`."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file

from compare.cli import main
from compare.run.specs.engine_facts import measured_models
from compare.run.specs.engines import engine_version
from lmeval_ext.errors import UserError
from tests.conftest import ROOT, VOCABULARY, evaluate, make_tokenizer, run, simple_evaluate

SETTINGS = {"eval_len": 64, "stride": 32, "max_rows": 10}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint of the toy engine: a table of logits and the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bigrams"
    make_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    bigrams = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    save_file({"bigrams": bigrams}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a folder on sys.path with the metadata of an installed package that has one entry-point line."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lm_eval.models]\ntoy = tests.models.toy_engine:Toy\n")
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    measured_models.cache_clear()
    yield site
    sys.path.remove(str(site))
    measured_models.cache_clear()


def bigram_logprobs(folder: Path) -> np.ndarray:
    """Returns log-probabilities [token before, token] of the toy engine's checkpoint, in float64."""
    from safetensors.numpy import load_file

    logits = load_file(folder / "model.safetensors")["bigrams"].astype(np.float64)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def numpy_perplexity(folder: Path, eval_len: int, stride: int, max_rows: int) -> float:
    """Returns the perplexity of the bundled text: every token of a window but the first, given the one before it."""
    from transformers import AutoTokenizer

    logprobs = bigram_logprobs(folder)
    lines = (ROOT / "lmeval_ext" / "tasks" / "sample.txt").read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)  # joined as WikiText's rows are
    ids = np.array(AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False))
    windows = [ids[start : start + eval_len] for start in range(0, max_rows * stride, stride)]
    return math.exp(-np.mean([logprobs[w[:-1], w[1:]] for w in windows]))


def metric(result: Any, name: str) -> float:
    return float(result["results"]["sample_strided"][f"{name},none"])


@pytest.mark.usefixtures("installed")
def test_perplexity_equals_numpy(toy: Path) -> None:
    result = evaluate("toy", "sample_strided", metadata=SETTINGS, pretrained=str(toy), label="Toy")
    assert metric(result, "token_perplexity") == pytest.approx(numpy_perplexity(toy, **SETTINGS), rel=1e-6)
    facts = result["config"]["quantization"]
    assert (facts["label"], facts["engine"], facts["engine_version"]) == ("Toy", "toy", "1.0")
    assert facts["tokens_per_second"] > 0


@pytest.mark.usefixtures("installed")
def test_divergence_from_its_own_reference_is_zero(toy: Path, tmp_path: Path) -> None:
    """The toy engine has no hidden states, so the store holds coded logits, whose error is below 1e-6 nats."""
    store = str(tmp_path / "reference")
    settings = {"metadata": SETTINGS, "pretrained": str(toy)}
    written = evaluate("toy", "sample_strided", save_reference=store, **settings)
    measured = evaluate("toy", "sample_strided", reference=store, **settings)
    assert json.loads((tmp_path / "reference" / "reference.json").read_text())["mode"] == "logits"
    assert abs(metric(measured, "kld")) < 1e-6
    assert metric(measured, "top1_agreement") == 1
    assert metric(measured, "token_perplexity") == metric(written, "token_perplexity")


@pytest.mark.usefixtures("installed")
def test_harness_task_scores_equal_numpy(toy: Path) -> None:
    """Multiple choice and rolling log-likelihoods use `score_windows`; an engine needs no code for them."""
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=str(ROOT / "tests" / "conformance" / "data"), include_defaults=False)
    result = simple_evaluate(
        model="toy",
        model_args={"pretrained": str(toy)},
        tasks=["conf_choice", "conf_pages"],
        task_manager=manager,
        limit=4,
        bootstrap_iters=0,
    )
    logprobs = bigram_logprobs(toy)
    tokenizer = AutoTokenizer.from_pretrained(toy)
    assert len(result["samples"]["conf_choice"]) == 4
    for sample in result["samples"]["conf_choice"]:
        for (context, continuation), ((total, _greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
            expected = logprobs[ids[:-1], ids[1:]][len(before) - 1 :].sum()
            assert total == pytest.approx(expected, rel=1e-5)
    for sample in result["samples"]["conf_pages"]:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(sample["arguments"][0][0])]
        assert sample["resps"][0][0] == pytest.approx(logprobs[ids[:-1], ids[1:]].sum(), rel=1e-5)


@pytest.mark.usefixtures("installed")
def test_generation_is_an_error_that_names_the_engine(toy: Path) -> None:
    manager = TaskManager(include_path=str(ROOT / "tests" / "conformance" / "data"), include_defaults=False)
    with pytest.raises(UserError, match="Toy scores tokens and generates no text"):
        simple_evaluate(
            model="toy", model_args={"pretrained": str(toy)}, tasks=["conf_sums"], task_manager=manager, limit=1
        )


@pytest.mark.usefixtures("installed")
def test_compare_run_passes_label_and_reference_to_the_engine(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"model": "toy", "args": {"pretrained": str(toy)}, "label": "Baseline", "reference": True},
        {"model": "toy", "args": {"pretrained": str(toy), "max_length": 128}, "label": "Candidate"},
    ]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    (tmp_path / "data.json").write_text(json.dumps({"dataset": "sample", "eval_len": 64, "eval_stride": 32}))
    files = ["-m", str(tmp_path / "models.json"), "-d", str(tmp_path / "data.json")]
    assert main(["run", *files, "--results", str(tmp_path / "results"), "-kld", "--dry-run"]) == 0
    baseline, candidate = [line for line in capsys.readouterr().out.splitlines() if "--model_args" in line]
    assert '"label": "Baseline"' in baseline
    assert '"save_reference": ' in baseline
    assert '"label": "Candidate"' in candidate
    assert '"reference": ' in candidate
    assert measured_models()["toy"].context_argument == "max_length"
    assert engine_version("toy").startswith("safetensors ")


@pytest.mark.engine
def test_command_line_resolves_the_entry_point(toy: Path, installed: Path, tmp_path: Path) -> None:
    """In a separate process, as `compare run` starts it, the harness resolves the name through the metadata."""
    done = run(
        "python", "-m", "lm_eval", "run", "--model", "toy", "--model_args", f"pretrained={toy},label=Toy",
        "--include_path", ROOT / "tests" / "conformance" / "data", "--tasks", "conf_choice", "--limit", "2",
        "--output_path", tmp_path / "out",
        env={"PYTHONPATH": f"{installed}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["quantization"]["label"] == "Toy"


def test_unknown_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="no model for this name found"):
        get_model("no-such-model")
