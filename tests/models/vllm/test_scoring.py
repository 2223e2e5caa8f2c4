"""Scores from vLLM's workers: the same as vLLM's own prompt_logprobs, however prompts are cut, cached and mixed."""

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
from tests.conftest import VOCABULARY, make_llama

BLOCK = 32  # tokens in a block of the prefix cache; CPU attention takes multiples of 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """float32, so that agreement is close; steps of 64 tokens, so that prompts are cut and mixed."""
    # vLLM's attention on a CPU takes heads of 32 and more
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


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCABULARY, n).tolist()


def own_way(model: Any, prompts: list[Any]) -> list[Any]:
    """vLLM's prompt_logprobs on the same engine."""
    return list(model.score_by_vllm(prompts))


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=2e-5)
        assert (a.greedy == b.greedy).all()


@pytest.mark.engine
def test_equals_prompt_logprobs_in_steps_that_cut_and_mix_prompts(model: Any) -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    prompts = [
        ScoringPrompt(random_ids(n, n), first) for n, first in ((199, 1), (30, 29), (65, 64), (64, 1), (131, 100))
    ]
    ours = model.score_prompts(prompts)
    assert [len(s.logprobs) for s in ours] == [198, 1, 1, 63, 31]
    assert_equal(ours, own_way(model, prompts))


@pytest.mark.engine
def test_choices_that_share_a_cached_context(model: Any) -> None:
    """Where a context ends on a block's border, the cache swallows the state that predicts the first answer token."""
    from lmeval_ext.models.vllm.client import ScoringPrompt

    for length in (3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1):
        context = random_ids(length, length)
        answers = [random_ids(n, 100 + n) for n in (1, 5, 2 * BLOCK, 2 * BLOCK + 3)]
        prompts = [ScoringPrompt(context + answer, length) for answer in answers]
        ours = model.score_prompts(prompts, reuse_prefixes=True)
        assert_equal(ours, own_way(model, prompts))
        again = model.score_prompts(prompts, reuse_prefixes=True)  # all but the last token is cached now
        assert_equal(again, ours)


@pytest.mark.engine
def test_multiple_choice_as_stock(model: Any) -> None:
    """The harness' own class on the same engine: truncation from the left, order, repeated requests."""
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
def test_ordinary_prompt_logprobs_still_work_beside_ours(model: Any) -> None:
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
def test_scores_of_an_interrupted_call_fit_no_later_one(model: Any) -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    left_over = model._engine._llm.collective_rpc
    model._engine._llm.collective_rpc = lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.score_prompts([ScoringPrompt(random_ids(30), 1)])
    finally:
        model._engine._llm.collective_rpc = left_over
    prompt = [ScoringPrompt(random_ids(30, 5), 1)]
    assert_equal(model.score_prompts(prompt), own_way(model, prompt))


@pytest.mark.engine
def test_what_cannot_be_scored_is_said(model: Any) -> None:
    """A context of white space alone has no tokens: the prefix token stands in. No sum is cut in silence."""
    model.batch_size = "auto"
    answer = random_ids(5)
    (bare,) = model._loglikelihood_tokens([(None, [], answer)], disable_tqdm=True)
    (whole,) = model._loglikelihood_tokens([(None, [model.prefix_token_id], answer)], disable_tqdm=True)
    assert bare == whole
    with pytest.raises(UserError, match="has no tokens"):
        model._loglikelihood_tokens([(("a", ""), [3], [])], disable_tqdm=True)
    with pytest.raises(UserError, match="has 199 tokens"):
        model._loglikelihood_tokens([(("a", "b"), [3], random_ids(199))], disable_tqdm=True)


def test_loading_leaves_the_harness_random_numbers_alone() -> None:
    """The harness seeds first and shuffles some tasks later; vLLM seeds in between."""
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
def test_the_result_says_how_it_was_scored(model: Any) -> None:
    assert model.describe().scoring == "engine"
    engine, model._engine, model._why_not_engine = model._engine, None, "a reason"
    try:
        facts = model.describe()
    finally:
        model._engine, model._why_not_engine = engine, None
    assert facts.scoring == "prompt_logprobs"
    assert "scored through prompt_logprobs: a reason" in facts.notes


# ------------------------------------------------------------------ parts, by hand


@pytest.mark.parametrize(
    ("first", "count", "wanted", "prompt", "expected"),
    [
        (0, 10, 1, 10, (1, 9)),  # the whole prompt: the last state predicts no token of it
        (0, 10, 7, 10, (7, 3)),
        (0, 4, 7, 10, None),  # a chunk before the scored part
        (4, 4, 7, 10, (7, 2)),  # states 4…7 predict tokens 5…8
        (8, 2, 7, 10, (9, 1)),
        (9, 1, 7, 10, None),  # the last token alone
        (6, 4, 7, 10, (7, 3)),
    ],
)
def test_spans(first: int, count: int, wanted: int, prompt: int, expected: Any) -> None:
    span = scored_span({EXTRA_ARG: [3, wanted]}, first, count, prompt)
    assert span == (None if expected is None else Span(3, *expected))


def test_no_span_where_nobody_asked() -> None:
    assert scored_span(None, 0, 10, 10) is None
    assert scored_span({"other": 1}, 0, 10, 10) is None


def test_rows_are_scored_in_chunks_with_the_right_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are one-hot, the output matrix is the identity: the logits are known."""
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


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    """Out of memory in the output matrix, and the caller goes on: later scores must not shift."""
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


def test_what_an_observer_tells_the_user_waits_until_it_is_taken() -> None:
    """Or is forgotten, where a run was interrupted before: the next one is another."""
    step = Step([Span(0, 1, 2, WindowSpan("w", 0, 2))], np.array([0, 1]), torch.tensor([1, 2]))
    for interrupted in (False, True):
        scorer = PromptScorer(lambda h: h * 3, vocabulary=4, observer=Refusing())
        scorer.add(torch.eye(4), step)
        scorer.add(torch.eye(4), step)  # goes on, and asks it no more
        assert scorer.observer is None
        if interrupted:
            scorer.stop_observing()
        else:
            assert scorer.take() == {"refused": "the store is damaged"}
            assert scorer.take() is None
        scorer.add(torch.eye(4), step)
        assert set(scorer.take() or {}) == {"spans", "logprobs", "greedy"}


class Refusing:
    asked, closed = 0, False

    def observe(self, *_: Any) -> Any:
        self.asked += 1
        assert self.asked == 1
        raise UserError("the store is damaged")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_ranks_without_logits_take_nothing() -> None:
    scorer = PromptScorer(lambda h: None, vocabulary=4)
    scorer.add(torch.eye(4), Step([Span(0, 1, 2)], np.array([0, 1]), torch.tensor([1, 2])))
    assert scorer.take() is None


@pytest.mark.engine
def test_incomplete_prompts_are_told_from_complete_ones() -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt, assemble

    taken = {
        "spans": [[5, 2, 2], [6, 1, 1], [99, 0, 1], [5, 4, 1], [5, 2, 1]],
        "logprobs": np.array([-1, -2, -3, -9, -4, -5], np.float32).tobytes(),
        "greedy": np.array([1, 0, 1, 0, 0, 1], bool).tobytes(),
    }
    found = assemble(taken, {5: ScoringPrompt([0] * 5, 2), 6: ScoringPrompt([0] * 4, 1)})
    assert list(found) == [5]  # of prompt 6 one token of three came; 99 is of another call
    assert found[5].logprobs.tolist() == [-5, -2, -4]  # position 2 came twice: the last counts
    assert found[5].greedy.tolist() == [True, False, False]


def test_v2_runner_rows_and_targets() -> None:
    """V2 keeps token ids in a table by slot; batch order is another. Worked by hand."""
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
    assert step.rows.tolist() == [3, 4, 5]  # its states of positions 1…5 stand in rows 2…6
    assert step.targets.tolist() == [23, 24, 25]
    worker.remove_request("a")
    worker.compute_prompt_logprobs(None, None, batch, table, None, np.array([4, 0, 6]))  # type: ignore[arg-type]
    assert len(added) == 1
    assert worker.other == "kept"
    assert seen == ["add", "add", "remove"]


@pytest.mark.engine
def test_private_names_of_vllm_are_still_there() -> None:
    """`runners.py` relies on these; if one is gone, scoring falls back to prompt_logprobs, and this test names it."""
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
    wanted = (
        "req_ids",
        "idx_mapping_np",
        "num_computed_prefill_tokens_np",
        "num_scheduled_tokens",
        "query_start_loc_np",
    )
    assert set(wanted) <= set(fields)


def test_an_unknown_runner_is_a_reason_not_a_crash() -> None:
    from lmeval_ext.models.vllm.worker import WorkerExtension

    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace()
    reason = worker.lmeval_ext_install()
    assert reason is not None
    assert "AttributeError" in reason


@pytest.mark.engine
def test_on_a_gpu_batch_size_and_order_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same company for every order and batch size: equal to the last bit, and in the order that was asked for."""
    from lmeval_ext.requests import window_request

    windows = [window_request("w", random_ids(n, n), 1, {}, (None, None, None)) for n in (50, 80, 30, 80)]
    alone = model.score_windows(windows)
    monkeypatch.setattr(model, "_on_cpu", False)
    for batch_size in (1, "auto"):
        monkeypatch.setattr(model, "batch_size", batch_size)
        forth, back = model.score_windows(windows), model.score_windows(windows[::-1])[::-1]
        assert forth == back
        for a, b in zip(forth, alone, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=2e-5)
