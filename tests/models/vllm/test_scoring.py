"""Scores from vLLM's workers equal vLLM's own prompt_logprobs, for prompts in any number of steps, cached or not."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.observer import WindowSpan
from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm import scoring as vllm_scoring
from lmeval_ext.models.vllm.scoring import EXTRA_ARG, PromptScorer, Span, Step, scored_span
from tests.conftest import make_llama, random_ids
from tests.models.vllm.fallback import without_worker_scores

BLOCK = 32  # tokens in a block of the prefix cache; CPU attention takes multiples of 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yields a float32 model whose steps hold 64 tokens, so that a step holds parts of several prompts."""
    # vLLM's attention on a CPU needs heads of at least 32
    folder = make_llama(tmp_path_factory.mktemp("models") / "llama-128", hidden_size=128)
    yield get_model("vllm_nvfp4")(
        pretrained=str(folder),
        dtype="float32",
        max_model_len=200,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        block_size=BLOCK,
        kv_cache_memory_bytes=1 << 26,
    )
    gc.collect()


def prompt_logprobs_scores(model: Any, prompts: list[Any]) -> list[Any]:
    """Returns scores through vLLM's prompt_logprobs on the same engine."""
    return list(model.score_by_vllm(prompts))


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=2e-5)
        assert (a.greedy == b.greedy).all()


@pytest.mark.engine
def test_scores_equal_prompt_logprobs_in_steps_with_parts_of_prompts(model: Any) -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    prompts = [
        ScoringPrompt(random_ids(n, n), first) for n, first in ((199, 1), (30, 29), (65, 64), (64, 1), (131, 100))
    ]
    ours = model.score_prompts(prompts)
    assert [len(s.logprobs) for s in ours] == [198, 1, 1, 63, 31]
    assert_equal(ours, prompt_logprobs_scores(model, prompts))


@pytest.mark.engine
def test_choices_on_a_cached_context_equal_prompt_logprobs(model: Any) -> None:
    """If a context ends at a block's border, the state that predicts the first answer token is in the cached part."""
    from lmeval_ext.models.vllm.client import ScoringPrompt

    for length in (3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1):
        context = random_ids(length, length)
        answers = [random_ids(n, 100 + n) for n in (1, 5, 2 * BLOCK, 2 * BLOCK + 3)]
        prompts = [ScoringPrompt(context + answer, length) for answer in answers]
        ours = model.score_prompts(prompts, reuse_prefixes=True)
        assert_equal(ours, prompt_logprobs_scores(model, prompts))
        again = model.score_prompts(prompts, reuse_prefixes=True)  # all but the last token is cached now
        assert_equal(again, ours)


@pytest.mark.engine
def test_multiple_choice_equals_stock_vllm(model: Any) -> None:
    """The requests include one that is cut from the left, and a repeated one; the stock class uses the same engine."""
    from lm_eval.models.vllm_causallms import VLLM

    context = random_ids(48)
    requests = [(None, context, random_ids(n, n)) for n in (4, 1, 9)]
    requests += [(None, random_ids(250, 7), random_ids(6, 8)), requests[0], (None, [3], random_ids(30, 9))]
    model.batch_size = "auto"
    stock = VLLM._loglikelihood_tokens(model, requests, disable_tqdm=True)
    ours = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (a, same_a), (b, same_b) in zip(ours, stock, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert same_a == same_b


@pytest.mark.engine
def test_other_requests_in_the_same_batch_are_not_affected(model: Any) -> None:
    import vllm

    ids = random_ids(40)
    params = [
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=0),
        vllm.SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, extra_args={EXTRA_ARG: [10**9, 1]}),
        vllm.SamplingParams(max_tokens=3, temperature=0),
    ]
    tokens = [vllm.TokensPrompt(prompt_token_ids=ids)] * 3
    outputs = model.model.generate(tokens, sampling_params=params, use_tqdm=False)
    assert len(outputs[0].prompt_logprobs) == 40
    assert len(outputs[2].outputs[0].token_ids) == 3
    (taken,) = model.model.collective_rpc("lmeval_ext_take")
    assert sum(count for _, _, count in taken["spans"]) == 39


@pytest.mark.engine
def test_scores_of_an_interrupted_call_are_not_used_later(model: Any) -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "collective_rpc", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.score_prompts([ScoringPrompt(random_ids(30), 1)])
    prompt = [ScoringPrompt(random_ids(30, 5), 1)]
    assert_equal(model.score_prompts(prompt), prompt_logprobs_scores(model, prompt))


@pytest.mark.engine
def test_empty_and_too_long_continuations_are_errors(model: Any) -> None:
    """An empty context becomes the prefix token, as for a context that is white space alone."""
    model.batch_size = "auto"
    continuation = random_ids(5)
    (without_context,) = model._loglikelihood_tokens([(None, [], continuation)], disable_tqdm=True)
    (with_prefix,) = model._loglikelihood_tokens([(None, [model.prefix_token_id], continuation)], disable_tqdm=True)
    assert without_context == with_prefix
    with pytest.raises(UserError, match="has no tokens"):
        model._loglikelihood_tokens([(("a", ""), [3], [])], disable_tqdm=True)
    with pytest.raises(UserError, match="has 199 tokens"):
        model._loglikelihood_tokens([(("a", "b"), [3], random_ids(199))], disable_tqdm=True)


def test_loading_does_not_change_the_random_state_of_the_harness() -> None:
    """The harness seeds first and shuffles some tasks later; vLLM seeds while it loads, in between."""
    import os
    import random

    from lmeval_ext.models.vllm.loading import engine_in_this_process

    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ

    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (the legacy state is the one that the harness seeds)
        torch.manual_seed(number)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002

    seed(5)
    expected = draw()
    seed(5)
    with engine_in_this_process():
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        seed(1)
    assert draw() == expected
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


@pytest.mark.engine
def test_record_names_the_way_of_scoring(model: Any) -> None:
    assert model.describe().scoring == "engine"
    with without_worker_scores(model, "a reason"):
        facts = model.describe()
    assert facts.scoring == "prompt_logprobs"
    assert "scored through prompt_logprobs: a reason" in facts.notes


# ------------------------------------------------------------------ without an engine


@pytest.mark.parametrize(
    ("first", "count", "scored_from", "prompt", "expected"),
    [
        (0, 10, 1, 10, (1, 9)),  # all of the prompt; its last state predicts no token of it
        (0, 10, 7, 10, (7, 3)),
        (0, 4, 7, 10, None),  # a chunk before the scored part
        (4, 4, 7, 10, (7, 2)),  # states 4…7 predict tokens 5…8
        (8, 2, 7, 10, (9, 1)),
        (9, 1, 7, 10, None),  # the last token alone
        (6, 4, 7, 10, (7, 3)),
    ],
)
def test_span_holds_the_scored_tokens_of_a_step(
    first: int, count: int, scored_from: int, prompt: int, expected: Any
) -> None:
    span = scored_span({EXTRA_ARG: [3, scored_from]}, first, count, prompt)
    assert span == (None if expected is None else Span(3, *expected))


def test_prompt_without_our_argument_has_no_span() -> None:
    assert scored_span(None, 0, 10, 10) is None
    assert scored_span({"other": 1}, 0, 10, 10) is None


def test_scores_in_chunks_use_the_right_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are one-hot and the output matrix is three times the identity, so the logits are known."""
    monkeypatch.setattr(vllm_scoring, "_LOGITS_BYTES_ON_CPU", 1)  # the smallest chunk, 16 rows
    states = torch.eye(40)
    scorer = PromptScorer(lambda h: h * 3, vocabulary=40)
    rows = np.array([*range(1, 20), *range(25, 39)])
    scorer.add(states, Step([Span(0, 1, 19), Span(1, 4, 14)], rows, torch.arange(33)))
    taken = scorer.take()
    assert taken is not None
    normalizer = np.log(np.exp(3) + 39)
    expected = np.where(rows == np.arange(33), 3, 0) - normalizer
    np.testing.assert_allclose(np.frombuffer(taken["logprobs"], np.float32), expected, rtol=1e-6)
    assert taken["spans"] == [[0, 1, 19], [1, 4, 14]]
    assert scorer.take() is None


def test_failed_step_does_not_shift_later_scores() -> None:
    """The output matrix runs out of memory once, and the caller goes on."""
    failing = [True]

    def head(states: torch.Tensor) -> torch.Tensor:
        if failing.pop() if failing else False:
            raise torch.cuda.OutOfMemoryError
        return states * 3

    scorer = PromptScorer(head, vocabulary=8)
    first, second = (Step([Span(n, 1, 3)], np.arange(3) + n, torch.arange(3) + n) for n in (0, 4))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        scorer.add(torch.eye(8), first)
    scorer.add(torch.eye(8), second)
    taken = scorer.take()
    assert taken is not None
    assert taken["spans"] == [[4, 1, 3]]
    assert len(np.frombuffer(taken["logprobs"], np.float32)) == 3


def test_error_of_an_observer_is_taken_once_or_dropped() -> None:
    """An error that was not taken before an interruption is dropped, since the next run is another one."""
    step = Step([Span(0, 1, 2, WindowSpan("w", 0, 2))], np.array([0, 1]), torch.tensor([1, 2]))
    for interrupted in (False, True):
        scorer = PromptScorer(lambda h: h * 3, vocabulary=4, observer=FailingObserver())
        scorer.add(torch.eye(4), step)
        scorer.add(torch.eye(4), step)  # the observer is not called again
        assert scorer.observer is None
        if interrupted:
            scorer.stop_observing()
        else:
            assert scorer.take() == {"refused": "the store is damaged"}
            assert scorer.take() is None
        scorer.add(torch.eye(4), step)
        assert set(scorer.take() or {}) == {"spans", "logprobs", "greedy"}


class FailingObserver:
    """An observer whose first call raises UserError."""

    calls, closed = 0, False

    def observe(self, *_: Any) -> Any:
        self.calls += 1
        assert self.calls == 1
        raise UserError("the store is damaged")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_ranks_without_logits_return_no_scores() -> None:
    scorer = PromptScorer(lambda h: None, vocabulary=4)
    scorer.add(torch.eye(4), Step([Span(0, 1, 2)], np.array([0, 1]), torch.tensor([1, 2])))
    assert scorer.take() is None


@pytest.mark.engine
def test_incomplete_prompts_have_no_scores() -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt, assemble

    taken = {
        "spans": [[5, 2, 2], [6, 1, 1], [99, 0, 1], [5, 4, 1], [5, 2, 1]],
        "logprobs": np.array([-1, -2, -3, -9, -4, -5], np.float32).tobytes(),
        "greedy": np.array([1, 0, 1, 0, 0, 1], bool).tobytes(),
    }
    scores = assemble(taken, {5: ScoringPrompt([0] * 5, 2), 6: ScoringPrompt([0] * 4, 1)})
    assert list(scores) == [5]  # prompt 6 has one score of three; 99 belongs to another call
    assert scores[5].logprobs.tolist() == [-5, -2, -4]  # position 2 was scored twice: the last one counts
    assert scores[5].greedy.tolist() == [True, False, False]


def test_v2_runner_gives_rows_and_targets_by_hand() -> None:
    """The V2 runner keeps token ids in a table by slot, whose order is not that of the batch."""
    from lmeval_ext.models.vllm.runners import _V2Worker

    seen: list[str] = []
    original = SimpleNamespace(
        add_request=lambda *a: seen.append("add"),
        remove_request=lambda *a: seen.append("remove"),
        compute_prompt_logprobs=lambda *a: {"theirs": 1},
        other="kept",
    )
    added: list[Step] = []
    scorer = SimpleNamespace(add=lambda states, step: added.append(step))
    worker = _V2Worker(original, scorer)  # type: ignore[arg-type]
    worker.add_request("a", 2, SimpleNamespace(extra_args={EXTRA_ARG: [7, 3]}))
    worker.add_request("b", 0, SimpleNamespace(extra_args=None))
    batch = SimpleNamespace(
        req_ids=["b", "a"],
        idx_mapping_np=np.array([0, 2]),
        num_computed_prefill_tokens_np=np.array([0, 1]),
        num_scheduled_tokens=np.array([2, 5]),
        query_start_loc_np=np.array([0, 2, 7]),
    )
    table = torch.arange(30, dtype=torch.int32).reshape(3, 10)
    result = worker.compute_prompt_logprobs(None, None, batch, table, None, np.array([4, 0, 6]))  # type: ignore[arg-type]
    assert result == {"theirs": 1}
    (step,) = added
    assert step.spans == [Span(7, 3, 3)]  # tokens 3, 4, 5 of a prompt of 6
    assert step.rows.tolist() == [3, 4, 5]  # rows 2…6 hold its states of positions 1…5
    assert step.targets.tolist() == [23, 24, 25]
    worker.remove_request("a")
    worker.compute_prompt_logprobs(None, None, batch, table, None, np.array([4, 0, 6]))  # type: ignore[arg-type]
    assert len(added) == 1
    assert worker.other == "kept"
    assert seen == ["add", "add", "remove"]


@pytest.mark.engine
def test_private_names_of_vllm_exist() -> None:
    """`runners.py` uses these names; without one of them, scoring falls back to prompt_logprobs."""
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    parameters = inspect.signature(v1.GPUModelRunner._get_prompt_logprobs_dict).parameters
    assert list(parameters) == ["self", "hidden_states", "num_scheduled_tokens"]
    source = inspect.getsource(v1.GPUModelRunner)
    for name in ("self.requests", "query_start_loc.np", "req_id_to_index", "self.kv_caches", "self.get_model"):
        assert name.removeprefix("self.") in source
    compute = inspect.signature(PromptLogprobsWorker.compute_prompt_logprobs).parameters
    assert list(compute)[1:] == [
        "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens"
    ]  # fmt: skip
    assert list(inspect.signature(PromptLogprobsWorker.add_request).parameters)[1:] == [
        "req_id", "req_idx", "sampling_params"
    ]  # fmt: skip
    fields = input_batch.InputBatch.__dataclass_fields__
    names = (
        "req_ids",
        "idx_mapping_np",
        "num_computed_prefill_tokens_np",
        "num_scheduled_tokens",
        "query_start_loc_np",
    )
    assert set(names) <= set(fields)


def test_unknown_runner_gives_a_reason() -> None:
    from lmeval_ext.models.vllm.worker import WorkerExtension

    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace()
    reason = worker.lmeval_ext_install()
    assert reason is not None
    assert "AttributeError" in reason


@pytest.mark.engine
def test_scores_on_a_gpu_do_not_depend_on_batch_size_and_order(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches on a GPU are the same for every order and batch size: scores are equal to the last bit."""
    from lmeval_ext.requests import window_request

    windows = [window_request("w", random_ids(n, n), 1, {}, (None, None, None)) for n in (50, 80, 30, 80)]
    one_at_a_time = model.score_windows(windows)
    monkeypatch.setattr(model, "_on_cpu", False)
    for batch_size in (1, "auto"):
        monkeypatch.setattr(model, "batch_size", batch_size)
        forth, back = model.score_windows(windows), model.score_windows(windows[::-1])[::-1]
        assert forth == back
        for a, b in zip(forth, one_at_a_time, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=2e-5)
