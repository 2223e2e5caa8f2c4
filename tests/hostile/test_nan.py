"""A model with NaN logits gives no figure, and the log, the result file and `compare` report it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compare.results.reading import read_file
from tests.conftest import TASKS, simple_evaluate

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def nan_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a NaN row in the output matrix, so that every softmax is NaN."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("nan") / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tasks(folder: Path) -> None:
    """Writes one task of each kind that uses log-likelihoods."""
    rows = [{"q": "The sky is", "gold": i % 2, "text": "the rain in Spain"} for i in range(4)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}, cache_dir: {folder}/cache}}\n"
        "dataset_path: json\ntest_split: test\nmetadata: {version: 1.0}\n"
    )
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [blue, green]\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}{common}")


def evaluated(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Evaluates a window task and the tasks above; returns the result file."""
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    write_tasks(folder)
    arguments = {"pretrained": str(model), "dtype": "float32"}
    metadata = {**arguments, "eval_len": 64, "stride": 64, "max_rows": 2}
    tracker = EvaluationTracker(output_path=str(folder / "out"))
    results: Any = simple_evaluate(
        model="hf_quant",
        model_args=arguments,
        tasks=["sample_strided", "choice", "rolling"],
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=[str(TASKS), str(folder)], include_defaults=False, metadata=metadata),
        evaluation_tracker=tracker,
        log_samples=False,
    )
    tracker.save_results_aggregated(results=results, samples=None)
    (file,) = (folder / "out").rglob("results_*.json")
    return file


def test_nan_logits_give_no_figure(
    nan_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        file = evaluated(nan_llama, tmp_path, monkeypatch)
    content = json.loads(file.read_text())
    assert content["results"]["sample_strided"]["token_perplexity,none"] is None
    assert content["configs"]["sample_strided"]["metadata"]["nonfinite_logprobs"] == 2 * 63
    assert content["results"]["choice"]["acc,none"] == 0.5, "the harness picks the first of NaN choices"
    quantization = content["config"]["quantization"]
    assert quantization["nan_loglikelihoods"] == 2 * 4 + 4
    assert "12 of 12 log-likelihoods are NaN" in quantization["notes"][-1]
    assert "8 of 8 log-likelihoods are NaN" in caplog.text
    assert "126 log-probabilities were NaN or infinite; the perplexity is null" in caplog.text
    figures = {(r.task, key): metric.value for r in read_file(file) for key, metric in r.metrics.items()}
    assert len(figures) == 5
    assert set(figures.values()) == {None}


def test_a_sound_model_counts_no_nan(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = evaluated(tiny_llama, tmp_path, monkeypatch)
    assert json.loads(file.read_text())["config"]["quantization"]["nan_loglikelihoods"] == 0
    assert all(metric.value is not None for record in read_file(file) for metric in record.metrics.values())
