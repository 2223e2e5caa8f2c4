"""The ExLlama benchmarks on the tiny engine, a float32 Llama behind the adapters' contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import exllama_scoring, harness_tasks
from benchmarks.harness_engines import ENGINES, ExLlama
from lmeval_ext.models.exllama.generation import GenerationJob
from tests.benchmarks.test_benchmarks import TOY, TOY_TASKS, assert_positive
from tests.models.exllama.tiny_engine import TinyExLlama, TinyGenerator

pytestmark = pytest.mark.engine


def test_exllama_scoring_compares_its_ways(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, path: str, **arguments: Any) -> TinyExLlama:
        return TinyExLlama(path, **arguments)

    monkeypatch.setattr(exllama_scoring, "load_adapter", load)
    monkeypatch.setitem(exllama_scoring.FORWARDS, "tiny", lambda model, ids: model(input_ids=ids).logits)
    output = tmp_path / "figures.json"
    exllama_scoring.main(["--model", str(tiny_llama), "--engine", "tiny", *TOY, "--output", str(output)])
    figures = json.loads(output.read_text())
    assert_positive(figures["sweep"], {"1", "2"})
    ways = figures["ways"]
    for name in ("tokens_per_second", "of_bare", "of_one_window"):
        assert_positive({way: row[name] for way, row in ways.items()}, {"bare forward", "one window", "this project"})
    assert ways["bare forward"]["of_bare"] == ways["one window"]["of_one_window"] == 1
    assert ways["this project"]["loglikelihood"] == pytest.approx(ways["one window"]["loglikelihood"], rel=1e-5)
    assert "of bare forward" in capsys.readouterr().out


class _DynamicGenerator:
    """The methods of an engine's dynamic generator that the benchmark uses, over the tiny generator."""

    paged = True

    def __init__(self, generator: TinyGenerator) -> None:
        self.generator = generator

    def enqueue(self, job: GenerationJob) -> None:
        self.generator.submit(job)

    def num_remaining_jobs(self) -> int:
        return len(self.generator.jobs)

    def iterate(self) -> list[dict[str, Any]]:
        return self.generator.step()


class _Tiny(ExLlama):
    adapter = "tests.models.exllama.tiny_engine:TinyExLlama"

    def __init__(self, path: str, new_tokens: int, batch_size: int, **arguments: Any) -> None:
        super().__init__(path, new_tokens, batch_size, **arguments)
        generator = self.model.generator()
        generator.wrapped = _DynamicGenerator(generator)

    def job(self, ids: torch.Tensor, new: int, index: int) -> GenerationJob:
        return GenerationJob(index, ids[0].tolist(), new)


def test_harness_tasks_compares_its_ways_on_exllama(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "tiny", _Tiny)
    output = tmp_path / "figures.json"
    harness_tasks.main(["tiny", str(tiny_llama), *TOY_TASKS, "max_length=256", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert_positive(figures["multiple_choice"]["per_second"], {"ours", "bare"})
    assert_positive(figures["generation"]["per_second"], {"ours", "engine"})
    assert_positive(figures["generation"]["ours_over"], {"engine"})
    assert "ours is" in capsys.readouterr().out
