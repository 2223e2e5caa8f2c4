"""The original's own answers, from `lmeval_ext.answers` to KL divergence and first divergent token, against numpy."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compare.cli import main as compare
from lmeval_ext import answers
from lmeval_ext.errors import UserError
from lmeval_ext.traces import read_trace
from tests.conftest import evaluate, run
from tests.divergence.independent import divergences, figures, log_probabilities, windows_of
from tests.divergence.test_end_to_end import perturbed
from tests.models.exllama.tiny_engine import TinyExLlama
from tests.tasks.test_own_answers import write_qbench

pytestmark = pytest.mark.engine

LENGTH = 40
PROMPTS = ["Iceland is", "The ring road", "1 + 1 =", {"name": "long", "kind": "chat", "prompt": "Tell me of ice. " * 5}]
DIVERGENT = ("first_divergence", "common_prefix", "identical_answers")


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tiny_llama, tmp_path_factory.mktemp("models") / "perturbed", 0.02)


@pytest.fixture(scope="module")
def trace(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of tiny_llama in float32."""
    folder = tmp_path_factory.mktemp("traces")
    return made(folder / "traces.json", tiny_llama)


def made(file: Path, model: Path, *options: str, prompts: Any = PROMPTS) -> Path:
    named = file.with_name("prompts.json")
    named.write_text(json.dumps(prompts))
    words = ["--model=hf_quant", f'--model_args={{"pretrained": "{model}", "dtype": "float32"}}', "--device=cpu"]
    answers.main([*words, f"--output={file}", f"--prompts={named}", f"--max_tokens={LENGTH}", *options])
    return file


@functools.cache
def loaded(folder: Path) -> Any:
    """The model of Transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def first_choices(folder: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, each by a whole forward of Transformers."""
    model, new = loaded(folder), list[int]()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *new]]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def scored(model: Any, folder: Path, trace: Path, task: str = "own_answers", **arguments: Any) -> Any:
    metadata = {"trace": str(trace)}
    if isinstance(model, str):
        return evaluate(model, task, metadata=metadata, pretrained=str(folder), dtype="float32", **arguments)
    return evaluate(model, task, metadata={"pretrained": str(folder), **metadata})


def metrics_of(result: Any, task: str = "own_answers") -> dict[str, Any]:
    return {name.removesuffix(",none"): value for name, value in result["results"][task].items()}


def divergent_token(equal: list[np.ndarray]) -> dict[str, float]:
    """The figures of answers, from whether each token is that of the original: bool [tokens] each."""
    position = [int(np.argmin(e)) if not e.all() else len(e) for e in equal]
    return {
        "first_divergence": float(np.mean(position)),
        "common_prefix": float(np.mean([p / len(e) for p, e in zip(position, equal, strict=True)])),
        "identical_answers": float(np.mean([e.all() for e in equal])),
    }


def test_trace_holds_the_first_choices_of_the_model(trace: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = json.loads((tiny_llama / "generation_config.json").read_text())
    content = json.loads(trace.read_text())
    assert len(content["rows"]) == 4
    for prompt, row in zip(PROMPTS, content["rows"], strict=True):
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        assert row["prompt_ids"] == tokenizer.encode(text)
        expected = first_choices(tiny_llama, row["prompt_ids"], LENGTH)
        ends = {tokenizer.eos_token_id, config["eos_token_id"]}
        end = next((i + 1 for i, token in enumerate(expected) if token in ends), LENGTH)
        assert row["response_ids"] == expected[:end]
    assert content["chat_template"] is None
    assert content["generation"] == {"max_tokens": LENGTH, "temperature": 0.0, "seed": None}
    assert content["model"]["engine"] == "transformers"
    assert content["model"]["weights_sha256"]
    assert (content["rows"][0]["name"], content["rows"][3]["name"]) == ("0", "long")
    assert read_trace(trace).greedy is True


def test_prompts_stand_in_the_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "chat"))
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for options, text in (((), "[Iceland is]>"), (("--no_chat_template",), "Iceland is")):
        content = json.loads(made(tmp_path / "t.json", folder, *options, prompts=PROMPTS[:1]).read_text())
        assert content["rows"][0]["prompt_ids"] == tokenizer.encode(text)
        assert (content["chat_template"] is None) == bool(options)


def test_sampled_trace_follows_its_seed(tiny_llama: Path, tmp_path: Path) -> None:
    responses = [
        json.loads(made(tmp_path / "t.json", tiny_llama, "--temperature=2", f"--seed={seed}").read_text())["rows"]
        for seed in (1, 1, 2)
    ]
    assert responses[0] == responses[1] != responses[2]
    assert read_trace(tmp_path / "t.json").greedy is False


def test_answer_ends_where_the_context_does(tiny_llama: Path, tmp_path: Path) -> None:
    """The context holds 256 tokens; a prompt that fills it is one line."""
    ids = AutoTokenizer.from_pretrained(tiny_llama).encode("ice " * 75)
    file = made(tmp_path / "t.json", tiny_llama, "--max_tokens=400", prompts=["ice " * 75])
    assert len(ids) + len(read_trace(file).rows[0].response_ids) <= 256
    with pytest.raises(UserError, match="which leave no room for an answer"):
        made(tmp_path / "t.json", tiny_llama, prompts=["ice " * 400])


def test_divergence_on_own_answers_equals_numpy(
    trace: Path, tiny_llama: Path, other_llama: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    saved = scored("hf_quant", tiny_llama, trace, save_reference=store)
    windows = windows_of(tiny_llama, "own_answers", trace=str(trace))
    assert len({len(w.ids) for w in windows}) > 1  # windows of several lengths
    p, q = (log_probabilities(folder, windows) for folder in (tiny_llama, other_llama))
    expected = figures(divergences(p, q, windows))
    for model in ("hf_quant", TinyExLlama(str(other_llama), reference=store)):
        own = {"reference": store} if isinstance(model, str) else {}
        metrics = metrics_of(scored(model, other_llama, trace, **own))
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name
    targets = [np.array(w.target_ids) for w in windows]
    equal = [np.argmax(rows, axis=1) == t for rows, t in zip(q, targets, strict=True)]
    assert not all(e.all() for e in equal)
    for name, value in divergent_token(equal).items():
        assert metrics[name] == pytest.approx(value), name
    assert metrics["top1_accuracy"] == pytest.approx(np.concatenate(equal).mean())
    original = metrics_of(saved)
    assert original["identical_answers"] == original["top1_accuracy"] == 1


def qbench_kld(model: Path, reference: Path, rows: list[tuple[list[int], list[int]]], extra: int) -> float:
    """qbench's mean: softmax in float32, the reference's logits rounded to float16, both cut off at −200.

    extra: 1 as in qbench, whose ranges end one position later than the response's last token is predicted.
    """
    kld: list[np.ndarray] = []
    models = [loaded(folder) for folder in (reference, model)]
    for prompt, response in rows:
        a = len(prompt) - 1
        with torch.no_grad():
            x, y = (m(torch.tensor([[*prompt, *response]])).logits[0, a : a + len(response) + extra] for m in models)
        x, y = x.clamp(min=-200).half().float(), y.clamp(min=-200)
        log_p, log_q = (torch.log_softmax(t, -1).double().numpy() for t in (x, y))
        kld.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    return float(np.concatenate(kld).mean())


def test_kld_equals_that_of_qbench_on_its_trace(
    trace: Path, tiny_llama: Path, other_llama: Path, tmp_path: Path
) -> None:
    rows = [(list(row.prompt_ids), list(row.response_ids)) for row in read_trace(trace).rows]
    file, store = write_qbench(tmp_path, rows), str(tmp_path / "store")
    scored("hf_quant", tiny_llama, file, save_reference=store)
    kld = metrics_of(scored("hf_quant", other_llama, file, reference=store))["kld"]
    assert kld > 0.01
    assert kld == pytest.approx(qbench_kld(other_llama, tiny_llama, rows, 0), abs=1e-5)
    assert kld == pytest.approx(qbench_kld(other_llama, tiny_llama, rows, 1), abs=1e-3)


@pytest.mark.parametrize("engine", ["hf_quant", "exllama"])
def test_greedy_answers_leave_the_original_where_numpy_says(
    engine: str, trace: Path, tiny_llama: Path, other_llama: Path
) -> None:
    for folder in (tiny_llama, other_llama):
        equal = [
            np.array(first_choices(folder, list(row.prompt_ids), len(row.response_ids))) == np.array(row.response_ids)
            for row in read_trace(trace).rows
        ]
        model = "hf_quant" if engine == "hf_quant" else TinyExLlama(str(folder))
        metrics = metrics_of(scored(model, folder, trace, "own_answers_greedy"), "own_answers_greedy")
        for name, value in divergent_token(equal).items():
            assert metrics[name] == pytest.approx(value), name
        assert (metrics["identical_answers"] == 1) == (folder == tiny_llama)


@pytest.mark.slow
def test_commands_from_the_original_to_the_table(
    tiny_llama: Path, other_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`compare traces`, the unmodified `lm_eval`, `compare table --versus` and the report."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["Iceland is", "The road", "1 + 1 =", "Ice", "Why?", "Say 5 words."]))
    arguments = f"pretrained={tiny_llama},dtype=float32"
    traces = tmp_path / "traces.json"
    words = ["traces", "--model", "hf_quant", "--model_args", arguments, "--device", "cpu", "--max-tokens", "20"]
    assert compare([*words, "--prompts", str(prompts), "-o", str(traces)]) == 0
    assert f"{traces}: 6 answers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.json", "traces.json"]  # no log is left
    for folder, role in ((tiny_llama, "save_reference"), (other_llama, "reference")):
        done = run(
            "lm_eval", "run", "--model", "hf_quant",
            "--model_args", f"pretrained={folder},dtype=float32,label={folder.name},{role}={tmp_path / 'store'}",
            "--device", "cpu", "--tasks", "own_answers,own_answers_greedy",
            "--metadata", json.dumps({"trace": str(traces)}), "--log_samples",
            "--output_path", str(tmp_path / "results"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for metric in ("own_answers/kld", "own_answers_greedy/first_divergence"):
        assert compare(["table", str(tmp_path / "results"), "--metric", metric, "--format", "md"]) == 0
        table = capsys.readouterr().out
        assert {"tiny-llama", "perturbed"} <= set(table.replace("|", " ").split()), table
    assert "First divergent token (tokens)" in table
    versus = ["--metric", "own_answers_greedy/first_divergence", "--versus", "tiny-llama"]
    assert compare(["table", str(tmp_path / "results"), *versus, "--format", "md"]) == 0
    assert "paired bootstrap over 6 blocks of 1 windows" in capsys.readouterr().out
    report = tmp_path / "report.html"
    assert compare(["report", str(tmp_path / "results"), "--metric", "own_answers/kld", "-o", str(report)]) == 0
    assert "own_answers" in report.read_text()


@pytest.mark.slow
def test_failing_model_is_one_line_and_keeps_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["traces", "--model", "hf", "--model_args", "pretrained=nowhere", "-o", str(tmp_path / "t.json")]
    assert compare(words) == 2
    error = capsys.readouterr().err
    assert "--model hf returns text, not the token ids" in error
    assert f"(log: {tmp_path / 't.json.log'})" in error
    assert not (tmp_path / "t.json").exists()
    assert compare([*words[:-1], str(tmp_path / "none" / "t.json")]) == 1
