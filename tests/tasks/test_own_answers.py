"""Trace files, and the tasks `own_answers` and `own_answers_greedy` on models whose answers are planned."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmeval_ext.answers import read_prompts
from lmeval_ext.errors import UserError
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores
from lmeval_ext.tokens import PROBE, HFTokenizer, tokenizer_sha256
from lmeval_ext.traces import read_trace, trace_bytes
from tests.conftest import evaluate, load_task, make_tokenizer
from tests.tasks.test_perplexity import HarnessModel, Uniform

ROWS = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14]), ([15, 16], [17, 18, 19]), ([20], [21]), ([22], [23, 24])]
FIRST_DIFFERENCES = (4, 0, 1, 1, 1)  # the first and fourth answers are equal to the end


def write_trace(folder: Path, tokenizer: Path, temperature: float = 0.0, rows: Any = ROWS) -> Path:
    probe = HFTokenizer(str(tokenizer)).encode(PROBE).ids
    header = {
        "model": {"label": "Original"},
        "tokenizer": {"name": "original", "sha256": tokenizer_sha256(probe)},
        "generation": {"max_tokens": 4, "temperature": temperature, "seed": None},
    }
    named = [{"name": f"p{i}", "prompt_ids": p, "response_ids": r} for i, (p, r) in enumerate(rows)]
    file = folder / "traces.json"
    file.write_bytes(trace_bytes(header, named))
    return file


def write_qbench(folder: Path, rows: Any = ROWS) -> Path:
    """A trace with the fields of ExLlamaV3's eval/qbench_prompts.py."""
    file = folder / "qbench_prompts.json"
    content = {
        "model": "/models/original-8.0bpw",
        "vocab_size": 384,
        "template_vars": {"enable_thinking": True},
        "meta": {"rows": len(rows), "input_tokens": 8, "output_tokens": 12},
        "rows": [{"conversation": i, "turn": 0, "input_ids": p, "response_ids": r} for i, (p, r) in enumerate(rows)],
    }
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def trace(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("traces"), tiny_tokenizer)


class Planned(Uniform):
    """Every token has probability 1/4; answers leave the stored ones after `FIRST_DIFFERENCES` tokens."""

    asked: list[AnswerRequest]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        scores = []
        for request, first in zip(requests, FIRST_DIFFERENCES, strict=False):
            greedy = [i != first for i in range(len(request.target_ids))]  # equal again after the difference
            scores.append(WindowScores.of(np.full(len(greedy), math.log(0.25)), greedy))
        return scores

    def generate_token_ids(self, requests: Sequence[AnswerRequest]) -> list[list[int]]:
        self.asked = list(requests)
        answers = [list(response) for _, response in ROWS]
        answers[1] = [2, 14]
        answers[2] = [17, 2, 19]
        answers[4] = [23]  # ended there
        return answers[: len(requests)]


def run_task(task: str, trace: Path, tokenizer: Path, model: Any = None, limit: int | None = None) -> tuple[Any, Any]:
    metadata = {"trace": str(trace), "tokenizer": str(tokenizer)}
    result = evaluate(model or Planned(), task, limit=limit, metadata=metadata)
    return result["results"][task], result["configs"][task]["metadata"]


def test_responses_are_scored_given_their_prompts(trace: Path, tiny_tokenizer: Path) -> None:
    task = load_task("own_answers", trace=str(trace), tokenizer=str(tiny_tokenizer))
    task.build_all_requests()
    assert [(r.context_ids, r.target_ids) for r in task.instances] == ROWS
    assert all(isinstance(r, WindowRequest) for r in task.instances)


def test_fingerprint_covers_ids_and_scored_positions(trace: Path, tiny_tokenizer: Path) -> None:
    _, record = run_task("own_answers", trace, tiny_tokenizer)
    packed, start = b"", 0
    for prompt, response in ROWS:
        end = start + len(prompt) + len(response)
        packed += struct.pack("<3q", start, end, start + len(prompt))
        packed += struct.pack(f"<{end - start}q", *prompt, *response)
        start = end
    assert record["tokens_sha256"] == hashlib.sha256(packed).hexdigest()
    assert record["text_sha256"] == hashlib.sha256(trace.read_bytes()).hexdigest()
    assert (record["windows"], record["scored_tokens"], record["longest_window"]) == (5, 12, 7)
    assert (record["protocol"], record["text"], record["trace_model"]) == ("own_answers", "traces.json", "Original")
    assert record["standard_error"]["block_windows"] == 1
    assert record["tokenizer_checked"] is True


def expected_figures() -> dict[str, float]:
    """By hand: 7 tokens in common over 5 answers, shares 1, 0, 1/3, 1, 1/2, two answers identical."""
    return {"first_divergence": 7 / 5, "common_prefix": (1 + 0 + 1 / 3 + 1 + 1 / 2) / 5, "identical_answers": 2 / 5}


@pytest.mark.parametrize("task", ["own_answers", "own_answers_greedy"])
def test_divergent_token_figures_match_figures_by_hand(task: str, trace: Path, tiny_tokenizer: Path) -> None:
    figures, record = run_task(task, trace, tiny_tokenizer)
    for name, value in expected_figures().items():
        assert figures[f"{name},none"] == pytest.approx(value), name
        assert 0 < figures[f"{name}_stderr,none"] < 1
        assert record["standard_error"][name] == figures[f"{name}_stderr,none"]
    assert ("token_perplexity,none" in figures) == (task == "own_answers")
    if task == "own_answers":
        assert figures["token_perplexity,none"] == pytest.approx(4)
        assert figures["top1_accuracy,none"] == pytest.approx(9 / 12)


def test_both_tasks_have_other_protocols_over_the_same_tokens(trace: Path, tiny_tokenizer: Path) -> None:
    scored, generated = (run_task(t, trace, tiny_tokenizer)[1] for t in ("own_answers", "own_answers_greedy"))
    assert scored["tokens_sha256"] == generated["tokens_sha256"]
    assert generated["protocol"] == "own_answers_greedy"


def test_greedy_answers_are_as_long_as_the_stored_ones_and_stop_at_nothing(trace: Path, tiny_tokenizer: Path) -> None:
    model = Planned()
    run_task("own_answers_greedy", trace, tiny_tokenizer, model)
    assert [r.prompt_ids for r in model.asked] == [prompt for prompt, _ in ROWS]
    assert [r.settings.max_new for r in model.asked] == [len(response) for _, response in ROWS]
    assert not any(r.settings.stop or r.settings.temperature for r in model.asked)


def test_limit_keeps_the_first_answers(trace: Path, tiny_tokenizer: Path) -> None:
    figures, record = run_task("own_answers_greedy", trace, tiny_tokenizer, limit=2)
    assert figures["first_divergence,none"] == pytest.approx(2)
    assert figures["first_divergence_stderr,none"] == "N/A"
    assert record["windows"] == 2


def test_error_is_unknown_where_all_answers_are_alike(trace: Path, tiny_tokenizer: Path) -> None:
    """Every answer identical: the lengths differ, the shares do not."""
    model = Planned()
    model.generate_token_ids = lambda requests: [response for _, response in ROWS]  # type: ignore[method-assign]
    figures, record = run_task("own_answers_greedy", trace, tiny_tokenizer, model)
    assert figures["identical_answers,none"] == figures["common_prefix,none"] == 1
    assert figures["identical_answers_stderr,none"] == figures["common_prefix_stderr,none"] == "N/A"
    assert record["standard_error"]["identical_answers"] is None
    assert figures["first_divergence,none"] == pytest.approx(12 / 5)
    assert 0 < figures["first_divergence_stderr,none"] < 1


def test_sampled_answers_have_no_divergent_token(tmp_path: Path, tiny_tokenizer: Path) -> None:
    sampled = write_trace(tmp_path, tiny_tokenizer, temperature=0.7)
    figures, record = run_task("own_answers", sampled, tiny_tokenizer)
    assert record["trace_greedy"] is False
    assert not any(name.startswith("first_divergence") for name in figures)
    assert figures["token_perplexity,none"] == pytest.approx(4)


def test_stock_model_has_no_divergent_token(trace: Path, tiny_tokenizer: Path) -> None:
    """It returns one sum per answer, which does not say where a token differs."""
    figures, _ = run_task("own_answers", trace, tiny_tokenizer, HarnessModel())
    assert figures["token_perplexity,none"] == pytest.approx(4)
    assert not any(name.startswith("first_divergence") for name in figures)


def test_nan_makes_divergent_token_unknown(trace: Path, tiny_tokenizer: Path) -> None:
    model = Planned()
    scores = model._loglikelihood_tokens

    def damaged(requests: Any, **kwargs: Any) -> Any:
        first, *others = scores(requests)
        return [WindowScores.of([math.nan] * len(first.logprobs), first.greedy), *others]

    model._loglikelihood_tokens = damaged  # type: ignore[method-assign]
    figures, _ = run_task("own_answers", trace, tiny_tokenizer, model)
    assert figures["first_divergence,none"] is None


def test_qbench_trace_is_scored_on_the_same_positions(tmp_path: Path, tiny_tokenizer: Path, caplog: Any) -> None:
    """Its ranges begin one position before the response, whose logits predict the response's first token."""
    task = load_task("own_answers", trace=str(write_qbench(tmp_path)), tokenizer=str(tiny_tokenizer))
    task.build_all_requests()
    assert [(r.context_ids, r.target_ids) for r in task.instances] == ROWS
    record = task.dump_config()["metadata"]
    assert (record["trace_format"], record["trace_model"]) == ("qbench test_trace", "/models/original-8.0bpw")
    assert (record["trace_greedy"], record["tokenizer_checked"]) == (None, False)
    assert "does not say with which tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no JSON", "is neither a trace of `compare traces` nor a qbench test_trace"),
        ("[1, 2]", "is neither"),
        ('{"rows": []}', "is neither"),
        ('{"rows": [{"text": "a"}]}', "is neither"),
        ('{"format": "lmeval-ext traces", "version": 2, "rows": []}', "has version 2"),
        ('{"format": "lmeval-ext traces", "version": 1, "rows": []}', "is neither"),
        ('{"format": "lmeval-ext traces", "version": 1, "rows": [{"response_ids": [1]}]}', "row 0: prompt_ids is not"),
        ('{"rows": [{"input_ids": [1], "response_ids": []}]}', "row 0: response_ids is not a list of token ids"),
        ('{"rows": [{"input_ids": [1], "response_ids": [2]}, 7]}', "row 1: input_ids is not"),
        ('{"rows": [{"input_ids": [true], "response_ids": [2]}]}', "row 0: input_ids is not"),
        ('{"rows": [{"input_ids": [-1], "response_ids": [2]}]}', "row 0: input_ids is not"),
    ],
)
def test_file_that_is_no_trace_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "traces.json"
    file.write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        read_trace(file)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_missing_trace_is_one_line(tmp_path: Path, tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match="make one with `compare traces`"):
        load_task("own_answers", trace=str(tmp_path / "none.json"), tokenizer=str(tiny_tokenizer))
    with pytest.raises(UserError, match=r"--metadata '\{\"trace\": \"FILE\"\}'"):
        load_task("own_answers", tokenizer=str(tiny_tokenizer))


def test_other_tokenizer_is_one_line(trace: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, vocabulary=300)
    with pytest.raises(UserError, match="was made with another tokenizer \\('original'\\)"):
        load_task("own_answers", trace=str(trace), tokenizer=str(tmp_path))


def test_answers_beyond_the_context_are_one_line(trace: Path, tiny_tokenizer: Path) -> None:
    words = "a prompt and its answer take 7 tokens, this model's context holds 6"
    with pytest.raises(UserError, match=words):
        load_task("own_answers", trace=str(trace), tokenizer=str(tiny_tokenizer), max_length=6)
    model = Planned()
    model.max_length = 6  # known only when the model is loaded
    with pytest.raises(UserError, match=words):
        run_task("own_answers", trace, tiny_tokenizer, model)


@pytest.mark.parametrize("kind", ["sampled", "qbench"])
def test_greedy_task_refuses_a_trace_that_is_not_greedy(tmp_path: Path, tiny_tokenizer: Path, kind: str) -> None:
    file = write_qbench(tmp_path) if kind == "qbench" else write_trace(tmp_path, tiny_tokenizer, temperature=0.7)
    with pytest.raises(UserError, match="is sampled" if kind == "sampled" else "does not say that its answers"):
        load_task("own_answers_greedy", trace=str(file), tokenizer=str(tiny_tokenizer))


def test_model_that_returns_text_is_refused(trace: Path, tiny_tokenizer: Path) -> None:
    """A text does not say which tokens were generated: several sequences have the same text."""
    with pytest.raises(UserError, match="HarnessModel returns text, not the token ids"):
        run_task("own_answers_greedy", trace, tiny_tokenizer, HarnessModel())


def test_bundled_prompts_are_varied() -> None:
    prompts = read_prompts()
    kinds = Counter(prompt.kind for prompt in prompts)
    assert kinds.keys() == {"reasoning", "code", "mathematics", "translation", "chat"}
    assert min(kinds.values()) >= 4
    assert len({prompt.name for prompt in prompts}) == len({prompt.text for prompt in prompts}) == len(prompts) == 24


@pytest.mark.parametrize("content", ["{}", "[]", '["", "b"]', '[{"text": "a"}]', "[1]", "no JSON"])
def test_unusable_prompts_are_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(UserError, match="prompts=") as raised:
        read_prompts(file)
    assert "\n" not in str(raised.value)
