"""Real tasks in the harness' own YAML, all four request types, the harness' options, and its command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from tests.conformance.adapters import ADAPTERS, Bench
from tests.conftest import run, simple_evaluate

pytestmark = pytest.mark.engine

DATA = Path(__file__).parent / "data"
TASKS = {
    "conf_choice": ("acc,none", "acc_norm,none"),
    "conf_flowers": ("acc,none", "acc_norm,none"),
    "conf_endings": ("perplexity,none", "acc,none"),
    "conf_sums": ("exact_match,first-number",),
    "conf_pages": ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"),
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(DATA), include_defaults=False)


def evaluated(model: Any, manager: TaskManager, tasks: list[str], **options: Any) -> Any:
    return simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **{"limit": 8, **options}
    )


def figures(found: Any) -> dict[str, float]:
    """Every metric of every task."""
    return {
        f"{task}/{metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_as_stock(bench: Bench, manager: TaskManager, name: str) -> None:
    """Beside each other: the stock model's numbers and ours."""
    stock = bench.first("tasks", lambda: evaluated(bench.stock(), manager, list(TASKS)))
    ours = evaluated(bench.model(name, batch_size=4), manager, list(TASKS))
    expected = figures(stock)
    assert {key.split("/")[0] for key in expected} == set(TASKS)
    assert figures(ours) == pytest.approx(expected, rel=1e-4)
    for task, metrics in TASKS.items():
        assert {f"{task}/{m}" for m in metrics} <= set(expected)
        assert len(ours["samples"][task]) == min(8, len(stock["samples"][task]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_options(bench: Bench, manager: TaskManager, name: str, tmp_path: Path) -> None:
    """--limit, --num_fewshot, --apply_chat_template, --log_samples, --seed; and --use_cache asks the model once."""
    options: dict[str, Any] = {"limit": 3, "num_fewshot": 2, "apply_chat_template": True, "fewshot_random_seed": 7}
    tasks = ["conf_choice", "conf_sums"]
    stock = bench.first("options", lambda: evaluated(bench.stock(), manager, tasks, **options))
    model = bench.model(name, batch_size=4)
    asked: list[str] = []
    for kind in ("_loglikelihood_tokens", "generate_until"):
        original = getattr(model, kind)
        setattr(model, kind, lambda *a, o=original, k=kind, **b: (asked.append(k), o(*a, **b))[1])
    found = [evaluated(model, manager, tasks, use_cache=str(tmp_path / "kept"), **options) for _ in range(2)]
    assert asked == ["_loglikelihood_tokens", "generate_until"]  # the second run took its answers from the cache
    assert figures(found[0]) == figures(found[1]) == pytest.approx(figures(stock), rel=1e-4)
    for task in tasks:
        ours, theirs = ({s["doc_id"]: s for s in f["samples"][task]} for f in (found[0], stock))
        assert len(ours) == 3
        for i, sample in ours.items():
            assert sample["arguments"] == theirs[i]["arguments"]
            first = sample["arguments"][0][0]
            assert first.count("[user]") == 3
            assert first.endswith("[assistant]")
        if task == "conf_sums":
            assert [s["resps"] for s in ours.values()] == [s["resps"] for s in theirs.values()]


@pytest.mark.parametrize("name", ADAPTERS)
def test_document_level_perplexity(
    bench: Bench, manager: TaskManager, name: str, wikitext: Path, monkeypatch: Any
) -> None:
    """The harness' `wikitext` on WikiText-2's articles: rolling windows, words and bytes of the text as it came."""
    monkeypatch.setenv("WIKITEXT2_DIR", str(wikitext))
    stock = bench.first("wikitext", lambda: evaluated(bench.stock(), manager, ["conf_wikitext"], limit=1))
    ours = evaluated(bench.model(name), manager, ["conf_wikitext"], limit=1)
    assert figures(ours) == pytest.approx(figures(stock), rel=1e-4)


def test_wikitext_has_62_articles(wikitext: Path, monkeypatch: Any) -> None:
    """As EleutherAI/wikitext_document_level, from which the harness' `wikitext` takes them."""
    from tests.conformance.data.conf_data import wikitext_documents

    monkeypatch.setenv("WIKITEXT2_DIR", str(wikitext))
    assert len(wikitext_documents()["test"]) == 62


def test_the_command_line(bench: Bench, manager: TaskManager, tmp_path: Path) -> None:
    done = run(
        "lm_eval", "run", "--model", "hf_quant",
        "--model_args", f"pretrained={bench.folder()},dtype=float32,max_length=256", "--device", "cpu",
        "--include_path", DATA, "--tasks", ",".join(TASKS), "--limit", "4", "--num_fewshot", "0", "--batch_size", "4",
        "--apply_chat_template", "--use_cache", tmp_path / "kept", "--log_samples", "--seed", "7",
        "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    options: dict[str, Any] = {"num_fewshot": 0, "apply_chat_template": True}
    stock = evaluated(bench.stock(), manager, list(TASKS), limit=4, **options)
    assert figures(found) == pytest.approx(figures(stock), rel=1e-4)
    assert found["config"]["quantization"]["bos"] == {
        "before_text": [], "prefix_token_id": 0, "add_bos_token": None,
    }  # fmt: skip
    assert len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == len(TASKS)


@pytest.mark.parametrize("name", ["hf_quant", "vllm_nvfp4", "llamacpp"])
def test_seed(bench: Bench, manager: TaskManager, name: str) -> None:
    """The harness seeds Python, NumPy and torch, and samples follow."""

    def answers(seed: int) -> Any:
        found = evaluated(
            model, manager, ["conf_sums"], random_seed=seed, torch_random_seed=seed,
            gen_kwargs={"do_sample": True, "temperature": 2.0, "until": []},
        )  # fmt: skip
        return [s["resps"] for s in found["samples"]["conf_sums"]]

    model = bench.model(name)
    state = random.getstate()
    try:
        assert answers(1) == answers(1)
        assert answers(1) != answers(2)
    finally:
        random.setstate(state)
