"""Every script of benchmarks/ runs at toy size and prints the figures that it promises; no test looks at a speed."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks import compare_scale, import_cost, random_llama, storage_headers, whole_command
from benchmarks.common import load_adapter, random_windows, window_requests
from lmeval_ext.storage import inspect
from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.conformance.adapters import Bench  # imports Transformers' models

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text())
TOY = ["--windows", "2", "--length", "48", "--repeats", "1"]
WEIGHTS = sum(inputs * outputs for inputs, outputs in random_llama.linears(random_llama.SHAPES["toy"]).values())
TOY_TASKS = ["--questions", "2", "--examples", "20", "--prompts", "2", "--new-tokens", "4", "--repeats", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tiny checkpoints: a folder and a GGUF file of the same weights."""
    from tests.conformance.adapters import Bench

    return Bench(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark's main with --output and returns what it wrote."""

    def run(main: Callable[[list[str]], Any], *arguments: str) -> dict[str, Any]:
        output = tmp_path / "figures.json"
        main([*arguments, "--output", str(output)])
        content: dict[str, Any] = json.loads(output.read_text())
        return content

    return run


def assert_positive(figures: dict[str, float], names: set[str]) -> None:
    """All figures are finite and above 0, and they are those of `names`."""
    assert set(figures) == names
    assert all(math.isfinite(value) and value > 0 for value in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_prints_its_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}" in done.stdout


# ------------------------------------------------------------------ without an engine


@pytest.mark.slow
def test_compare_scale_prints_seconds_and_growth(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_scale.main(["3", "6", "--repeats", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["3", "6"]
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row)


def test_compare_scale_growth_is_the_exponent_between_two_sizes() -> None:
    assert compare_scale.growth((100, 2.0), 200, 8.0) == "2.00"
    assert compare_scale.growth(None, 200, 8.0) == ""
    assert compare_scale.growth((100, -0.1), 200, 8.0) == ""  # below the time of --help


@pytest.mark.slow
def test_import_cost_prints_both_sides_and_their_difference(capsys: pytest.CaptureFixture[str]) -> None:
    import_cost.main(["--runs", "1", "--case", "python -c pass"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    with_hook, without, difference = (float(number) for number in re.findall(r"([-+]?[\d.]+) ms", line))
    assert with_hook > 0
    assert without > 0
    assert difference == pytest.approx(with_hook - without, abs=0.2)


def test_storage_headers_measures_a_checkpoint_whose_figures_are_known(
    record: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = record(storage_headers.main, "toy", "--repeats", "1")["toy"]
    shape = storage_headers.SHAPES["toy"]
    matrices = shape.layers * (4 + 3 * shape.experts)
    elements = shape.layers * (4 * shape.hidden**2 + 3 * shape.experts * shape.hidden * shape.inner)
    assert figures["layer_bpw"] == pytest.approx(4.5 + 64 * matrices / elements)  # two float32 per matrix
    assert figures["header_mb"] > 0
    assert "toy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scheme", "family", "layer_bpw"),
    [
        ("nvfp4", "NVFP4", 4.5 + 7 * 32 / WEIGHTS),  # codes, a byte for 16 of them, a float32 per matrix
        ("bfloat16", None, 16.0),
        ("exl3", "EXL3", None),
        ("exl2", "EXL2", None),
    ],
)
def test_random_llama_is_a_checkpoint_of_its_scheme(
    scheme: str, family: str | None, layer_bpw: float | None, tmp_path: Path
) -> None:
    random_llama.main([str(tmp_path), "--shape", "toy", "--scheme", scheme])
    info = inspect(tmp_path)
    assert info.family == family or family is None
    if layer_bpw is None:  # 4-bit codes, and scales or signs
        assert 4.0 < info.layer_bpw < 4.6
    else:
        assert info.layer_bpw == pytest.approx(layer_bpw)


def test_random_llama_keeps_a_finished_folder(tmp_path: Path) -> None:
    random_llama.make(tmp_path, random_llama.SHAPES["toy"], "bfloat16")
    file = tmp_path / "model-head.safetensors"
    file.write_bytes(b"kept")
    random_llama.make(tmp_path, random_llama.SHAPES["toy"], "bfloat16")
    assert file.read_bytes() == b"kept"


def test_whole_command_refuses_ways_that_measured_something_else() -> None:
    same = [whole_command.Run(1.0, 1.0, (10.0,))]
    assert whole_command.check_same({"bare": same, "ours": same, "single": same}) == 10.0
    with pytest.raises(SystemExit, match=r"bare found a perplexity of 10\.3, the median of all ways is 10\.0"):
        whole_command.check_same({"bare": [whole_command.Run(1.0, 1.0, (10.3,))], "ours": same, "single": same})


# ------------------------------------------------------------------ on engines


WHOLE = ["--windows", "2", "--length", "64", "--stride", "32", "--models", "1", "--repeats", "1"]


@pytest.mark.engine
def test_whole_command_compares_its_ways(models: Bench, record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    figures = record(whole_command.main, "hf_quant", str(models.folder()), *WHOLE, "dtype=float32")
    for clock in ("wall", "cpu"):
        assert_positive(figures[clock]["seconds"], {"bare", "ours", "stock", "single", "compare"})
        assert_positive(figures[clock]["ratios"], {"ours_over_bare", "ours_over_stock", "compare_over_single"})
    assert figures["perplexity"] > 1
    assert "ours_over_bare" in capsys.readouterr().out


@pytest.mark.engine
@pytest.mark.parametrize(
    ("adapter", "arguments"),
    [("llamacpp", []), ("vllm_nvfp4", ["dtype=float32", f"kv_cache_memory_bytes={1 << 26}"])],
)
def test_whole_command_bare_script_finds_the_adapters_perplexity(
    models: Bench, adapter: str, arguments: list[str], record: Any
) -> None:
    model = str(models.gguf() if adapter == "llamacpp" else models.folder())
    only = ["--only", "bare"]
    figures = record(whole_command.main, adapter, model, *WHOLE, *only, *arguments)
    hf = record(whole_command.main, "hf_quant", str(models.folder()), *WHOLE, *only, "dtype=float32")
    assert figures["perplexity"] == pytest.approx(hf["perplexity"], rel=1e-3)


@pytest.mark.engine
def test_random_llama_runs_in_transformers_with_finite_logits(tmp_path: Path) -> None:
    random_llama.make(tmp_path, random_llama.SHAPES["toy"], "nvfp4")
    model = load_adapter("hf_quant", str(tmp_path), device="cpu")
    windows = window_requests(random_windows(random.Random(0), model.vocabulary, 2, 32))
    assert all(math.isfinite(scores.loglikelihood) for scores in model.score_windows(windows))


@pytest.mark.engine
def test_vllm_scoring_compares_its_ways(models: Bench, record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import vllm_scoring

    engine = ["dtype=float32", "max_model_len=256", "max_num_seqs=4", f"kv_cache_memory_bytes={1 << 26}"]
    figures = record(vllm_scoring.main, str(models.folder()), *TOY, "--guide-windows", "1", "--choices", "1", *engine)
    ways = {"bare", "limit", "guide", "stock", "flat", "ours"}
    for name in ("tokens_per_second", "of_limit", "ours_over"):
        assert_positive(figures[name], ways)
    assert figures["of_limit"]["limit"] == figures["ours_over"]["ours"] == 1
    assert_positive(figures["multiple_choice"]["requests_per_second"], {"stock", "ours"})
    printed = capsys.readouterr().out
    assert "of limit" in printed
    assert "ours_over_stock" in printed


def test_vllm_scorer_drops_logits_and_scores_again() -> None:
    """`limit` must run the output matrix, keep no score, and leave the scorer as it was."""
    from benchmarks.vllm_scoring import drop_logits
    from lmeval_ext.models.vllm.scoring import PromptScorer, Span, Step

    calls: list[int] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return states

    worker = SimpleNamespace(lmeval_ext_scorer=PromptScorer(head, vocabulary=4))
    step = Step([Span(0, 1, 2)], np.array([0, 1]), torch.tensor([1, 2]))
    scorer = worker.lmeval_ext_scorer
    drop_logits(worker, True)
    scorer.add(torch.eye(4), step)
    assert calls == [2]
    assert scorer.take() is None
    drop_logits(worker, False)
    scorer.add(torch.eye(4), step)
    assert scorer.compute_logits is head
    assert (scorer.take() or {})["spans"] == [[0, 1, 2]]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("adapter", "arguments"),
    [
        ("hf_quant", ["device=cpu", "dtype=float32", "max_length=256"]),
        ("llamacpp", ["n_threads=1", "n_threads_batch=1", "max_length=256"]),
    ],
)
def test_divergence_compares_plain_reference_and_save(
    models: Bench, adapter: str, arguments: list[str], record: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import divergence

    model = str(models.gguf() if adapter == "llamacpp" else models.folder())
    other = ["--reference-from", f"hf_quant:{models.folder()}"] if adapter == "llamacpp" else []
    figures = record(divergence.main, adapter, model, *TOY, *other, *arguments)
    for name in ("tokens_per_second", "times_plain"):
        assert_positive(figures[name], {"plain", "reference", "reference_chunk=64", "save"})
    assert figures["times_plain"]["plain"] == 1
    assert figures["stored_bytes"] > 0
    assert figures["float32_logits_bytes"] == 2 * 47 * 384 * 4
    assert "peak GiB" in capsys.readouterr().out


@pytest.mark.engine
@pytest.mark.parametrize(
    ("adapter", "arguments", "choices", "generation"),
    [
        (
            "hf_quant",
            ["device=cpu", "dtype=float32", "max_length=256"],
            {"ours", "stock", "engine"},
            {"ours", "stock", "engine"},
        ),
        ("llamacpp", ["n_threads=1", "n_threads_batch=1", "max_length=256"], {"ours", "engine"}, {"ours", "engine"}),
        (
            "vllm_nvfp4",
            ["dtype=float32", "max_model_len=258", "max_num_seqs=8", f"kv_cache_memory_bytes={1 << 26}"],
            {"ours", "stock", "engine", "bare"},
            {"ours", "stock", "engine"},
        ),
    ],
)
def test_harness_tasks_compares_its_ways(
    models: Bench,
    adapter: str,
    arguments: list[str],
    choices: set[str],
    generation: set[str],
    record: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks import harness_tasks

    model = str(models.gguf() if adapter == "llamacpp" else models.folder())
    figures = record(harness_tasks.main, adapter, model, *TOY_TASKS, *arguments)
    assert_positive(figures["multiple_choice"]["per_second"], choices)
    assert_positive(figures["multiple_choice"]["ours_over"], choices - {"ours"})
    assert_positive(figures["generation"]["per_second"], generation)
    assert_positive(figures["generation"]["ours_over"], generation - {"ours"})
    assert "ours is" in capsys.readouterr().out
