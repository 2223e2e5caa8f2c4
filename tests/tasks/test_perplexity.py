"""The perplexity tasks in the harness: scores, records and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from lm_eval.utils import make_table

from lmeval_ext.errors import UserError
from lmeval_ext.models import harness_models  # noqa: F401 (adds the method)
from lmeval_ext.requests import REQUEST_TYPE, TokenColumn, WindowRequest, WindowScores
from tests.conftest import evaluate, load_task

SMALL = {"eval_len": 64, "stride": 32, "max_rows": 24}


class Uniform(TemplateLM):
    """Gives every token the probability 1/4; `planted` replaces one log-probability of the first window."""

    planted: float | None = None
    tokenizer = None
    eot_token_id = 0
    max_length = 1 << 20

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        raise AssertionError("windows come as ids")

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        scores = []
        for request in requests:
            logprobs = np.full(len(request.target_ids), math.log(0.25), dtype=np.float32)
            if self.planted is not None and not scores:
                logprobs[3] = self.planted
            scores.append(WindowScores.of(logprobs, [True, *[False] * (len(logprobs) - 1)]))
        return scores

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> Any: ...

    def generate_until(self, requests: Any, **kwargs: Any) -> Any: ...


class HarnessModel(Uniform):
    """Answers like a model of the harness itself: one sum per request, and whether all tokens were greedy."""

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return [(len(continuation) * math.log(0.25), False) for _, _context, continuation in requests]


def run_task(model: Any, task: str = "sample_strided", limit: int | None = None, **metadata: Any) -> tuple[Any, Any]:
    result = evaluate(model, task, limit=limit, metadata=metadata)
    return result["results"][task], result["configs"][task]["metadata"]


def test_harness_still_has_the_method_that_scores_tokens() -> None:
    assert "_loglikelihood_tokens" in TemplateLM.__abstractmethods__
    assert hasattr(TemplateLM, REQUEST_TYPE)  # ours, added to LM


def test_metrics_and_record_match_figures_by_hand(tiny_tokenizer: Path) -> None:
    metrics, record = run_task(Uniform(), tokenizer=str(tiny_tokenizer), **SMALL)
    assert metrics["token_perplexity,none"] == pytest.approx(4, rel=1e-6)
    assert metrics["token_perplexity_stderr,none"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1_accuracy,none"] == pytest.approx(1 / 63)
    assert "bits_per_byte,none" not in metrics  # tokens are scored several times
    assert record["windows"] == 24
    assert record["scored_tokens"] == 24 * 63
    assert record["distinct_tokens"] == 63 + 23 * 32
    assert record["standard_error"]["block_windows"] == 2
    assert record["standard_error"]["blocks"] == 12
    assert record["protocol"] == "exllama"
    assert record["nonfinite_logprobs"] == 0
    assert record["tokenizer"] == str(tiny_tokenizer)
    assert len(record["tokens_sha256"]) == len(record["text_sha256"]) == 64


def test_limit_scores_and_records_the_first_windows(tiny_tokenizer: Path) -> None:
    metrics, record = run_task(Uniform(), limit=3, tokenizer=str(tiny_tokenizer), **SMALL)
    _, three = run_task(Uniform(), tokenizer=str(tiny_tokenizer), **(SMALL | {"max_rows": 3}))
    assert record["windows"] == 3
    assert record["tokens_sha256"] == three["tokens_sha256"]
    assert metrics["token_perplexity_stderr,none"] == "N/A"  # one block
    assert record["standard_error"]["token_perplexity"] is None


def test_samples_hold_the_logprobs(tiny_tokenizer: Path) -> None:
    result = evaluate(Uniform(), "sample_strided", limit=2, metadata={"tokenizer": str(tiny_tokenizer), **SMALL})
    sample = json.loads(json.dumps(result["samples"]["sample_strided"][1]))
    total, all_greedy, logprobs, greedy, divergence = sample["resps"][0][0]
    assert divergence is None  # no reference
    assert len(logprobs) == len(greedy) == 63
    assert total == pytest.approx(sum(logprobs))
    assert (all_greedy, greedy[0], greedy[1]) == (False, True, False)
    assert sample["doc"] == {"window": 1, "start": 32, "end": 96, "first_target": 33}


def test_harness_models_have_no_top1_accuracy(tiny_tokenizer: Path) -> None:
    metrics, _ = run_task(HarnessModel(), tokenizer=str(tiny_tokenizer), **SMALL)
    assert metrics["token_perplexity,none"] == pytest.approx(4)
    assert not any(key.startswith("top1") for key in metrics)


@pytest.mark.slow
def test_bits_per_byte_exists_if_tokens_are_scored_once(tiny_tokenizer: Path) -> None:
    """Two bits per token: bits per byte = 2 × scored tokens / UTF-8 bytes of the text after its first token."""
    metrics, record = run_task(Uniform(), "wiki2_sliding", text_path=_text(), tokenizer=str(tiny_tokenizer), **_ALL)
    from transformers import AutoTokenizer

    text = "\n\n".join(_rows())
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n_bytes = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert record["scored_tokens"] == record["distinct_tokens"] == len(ids) - 1
    assert metrics["bits_per_byte,none"] == pytest.approx(2 * (len(ids) - 1) / n_bytes)


_ALL = {"eval_len": 64, "stride": 32, "max_rows": 0}


def _text() -> str:
    from lmeval_ext.tasks.corpus import SAMPLE

    return str(SAMPLE)


def _rows() -> list[str]:
    lines = Path(_text()).read_text(encoding="utf-8").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines[:-1]]


@pytest.mark.parametrize("planted", [math.nan, -math.inf])
def test_nonfinite_logprob_is_counted_and_gives_null(tiny_tokenizer: Path, planted: float, caplog: Any) -> None:
    model = Uniform()
    model.planted = planted
    result = evaluate(model, "sample_strided", metadata={"tokenizer": str(tiny_tokenizer), **SMALL})
    metrics, record = result["results"]["sample_strided"], result["configs"]["sample_strided"]["metadata"]
    assert "N/A" in make_table(result)  # the harness prints it
    assert record["nonfinite_logprobs"] == 1
    assert metrics["token_perplexity,none"] is None
    assert metrics["token_perplexity_stderr,none"] == "N/A"
    assert metrics["top1_accuracy,none"] is None
    assert "1 log-probabilities were NaN or infinite" in caplog.text


def test_llamacpp_protocol_puts_bos_first_if_the_vocabulary_adds_it(tiny_tokenizer: Path, bos_tokenizer: Path) -> None:
    for folder, first in ((bos_tokenizer, 0), (tiny_tokenizer, None)):
        task = load_task("wiki2_llamacpp", text_path=_text(), tokenizer=str(folder), eval_len=64)
        task.build_all_requests(limit=3)
        heads = {request.ids[0] for request in task.instances}
        assert (heads == {first}) == (first is not None)
        assert [len(r.target_ids) for r in task.instances] == [31] * 3


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"stride": 0}, "stride=0"),
        ({"eval_len": 300_000, "stride": 512}, "too few for one window"),
        ({"eval_len": 512, "stride": 512, "max_length": 256}, "beyond the model's context"),
        ({"eval_len": 256, "stride": 256, "max_model_len": 256}, "less one generated token"),
        ({"text_path": 5}, "expected the name of a file"),
        ({"tokenizer": None}, "no tokenizer is known"),
        ({"protocol": "other"}, "choose one of"),
        ({"blank_rows": "some"}, "blank_rows"),
    ],
)
def test_unusable_settings_raise(tiny_tokenizer: Path, metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_task("sample_strided", **({"tokenizer": str(tiny_tokenizer)} | metadata))


def test_context_is_read_from_config_before_the_model_loads(tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match="max_position_embeddings=256"):
        load_task("sample_strided", pretrained=str(tiny_tokenizer), eval_len=257, stride=64)


def test_misspelt_setting_logs_a_suggestion(tiny_tokenizer: Path, caplog: Any) -> None:
    load_task("sample_strided", tokenizer=str(tiny_tokenizer), eval_lenn=64, **SMALL)
    assert "did you mean 'eval_len'" in caplog.text


def test_request_is_the_harness_triple() -> None:
    request = WindowRequest(REQUEST_TYPE, {}, ("w", [1, 2], [3]), 0)  # type: ignore[arg-type]
    nothing, context, continuation = request
    assert (nothing, context, continuation) == (None, [1, 2], [3])
    assert (request[-1], request[-2], request[1] + request[2]) == ([3], [1, 2], [1, 2, 3])


def test_scores_keep_every_bit_of_float32() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(3)).numpy()
    scores = WindowScores.of(values, values > 0)
    assert np.array_equal(np.array(scores.logprobs, dtype=np.float32), values)
    assert scores.loglikelihood == pytest.approx(float(values.astype(np.float64).sum()), rel=1e-12)


@given(st.lists(st.floats(width=32), min_size=1))
def test_scores_read_back_as_the_same_float32(values: list[float]) -> None:
    given_values = np.array(values, dtype=np.float32)
    written = json.loads(json.dumps(WindowScores.of(given_values, given_values > 0).logprobs))
    np.testing.assert_array_equal(np.array(written, dtype=np.float32), given_values)


@given(st.lists(st.floats(width=32), min_size=1))
def test_column_prints_the_same_list_as_logprobs(values: list[float]) -> None:
    """--log_samples writes the column as text, with the same digits as `logprobs`: every bit of the float32."""
    given_values = np.array(values, dtype=np.float32)
    scores = WindowScores.of(given_values, given_values > 0, {"kld": given_values, "agree": given_values > 0})
    assert scores.divergence is not None
    assert str(scores.divergence) == str({"kld": scores.logprobs, "agree": scores.greedy})
    np.testing.assert_array_equal(np.asarray(scores.divergence["kld"], np.float64), given_values)
    assert np.asarray(scores.divergence["agree"]).dtype == bool


def test_column_does_not_keep_the_batch_alive() -> None:
    batch = np.zeros((16, 100), dtype=np.float32)
    column = TokenColumn(batch[3])
    batch[3] = 1
    assert column.values.base is None
    assert column == TokenColumn(np.zeros(100))
    assert column != TokenColumn(batch[3])
    assert column != TokenColumn(np.zeros(99))


def test_scores_print_ten_digits() -> None:
    """Ten significant digits, instead of the 17 of a float64."""
    values = -np.random.default_rng(0).exponential(3, 1000).astype(np.float32)
    assert max(len(repr(v)) for v in WindowScores.of(values, values > 0).logprobs) <= len("-0.00012345678901")


def test_samples_option_records_the_scored_windows(tiny_tokenizer: Path) -> None:
    task = load_task("sample_strided", tokenizer=str(tiny_tokenizer), **SMALL)
    task.build_all_requests(samples=[4, 1, 1])
    record = task.dump_config()["metadata"]
    assert [r.doc["window"] for r in task.instances] == [1, 4]
    assert record["windows"] == 2
    assert record["scored_tokens"] == 2 * 63
    with pytest.raises(UserError, match="windows 0 to 23"):
        task.build_all_requests(samples=[24])


def test_windows_inside_one_character_count_for_bits_per_byte(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Targets without a byte of their own still cost bits; with stride 1 many windows have only such targets."""
    text = tmp_path / "japanese.txt"
    text.write_text("東京は日本の首都である。\n" * 3)
    settings = {"text_path": str(text), "tokenizer": str(tiny_tokenizer), "eval_len": 8, "stride": 1, "max_rows": 0}
    metrics, record = run_task(Uniform(), "wiki2_sliding", **settings)
    joined = "\n\n".join(line + "\n" for line in text.read_text().splitlines())
    n_bytes = len(joined.encode()) - 3  # the first token stands for the first character
    assert metrics["bits_per_byte,none"] == pytest.approx(2 * record["scored_tokens"] / n_bytes)


def test_raw_text_equals_the_file_without_last_line_end(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """llama-perplexity reads the file unchanged, blank lines included, but without the last line end."""
    from lmeval_ext.tasks.corpus import Corpus, read_corpus

    text = tmp_path / "own.txt"
    text.write_text("First.\n\n  \nSecond.\n")
    assert read_corpus(text).raw() == "First.\n\n  \nSecond."
    assert Corpus("rows", ("a doc", "", "b doc")).raw() == "a doc\n \nb doc"


@pytest.mark.parametrize(("spare", "length", "fits"), [(0, 64, True), (0, 63, False)])
def test_harness_model_refuses_windows_beyond_its_context(
    tiny_tokenizer: Path, spare: int, length: int, fits: bool
) -> None:
    model = HarnessModel()
    model.max_length = length - spare
    if fits:
        run_task(model, limit=1, tokenizer=str(tiny_tokenizer), **SMALL)
    else:
        with pytest.raises(UserError, match="eval_len=64 is beyond this model's context of 63"):
            run_task(model, limit=1, tokenizer=str(tiny_tokenizer), **SMALL)


def test_harness_vllm_reserves_one_position(tiny_tokenizer: Path) -> None:
    vllm_like = type("VLLM", (HarnessModel,), {"__module__": "lm_eval.models.vllm_causallms", "max_length": 64})
    with pytest.raises(UserError, match=r"context of 63 tokens \(less the one token"):
        run_task(vllm_like(), limit=1, tokenizer=str(tiny_tokenizer), **SMALL)


def test_model_without_token_scores_is_refused(tiny_tokenizer: Path) -> None:
    from lm_eval.models.dummy import DummyLM

    with pytest.raises(UserError, match="DummyLM does not score token ids"):
        run_task(DummyLM(), limit=1, tokenizer=str(tiny_tokenizer), **SMALL)
