"""`loglikelihood` and `loglikelihood_rolling`: every adapter gives what the harness' `hf` gives in float32."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from lmeval_ext.errors import UserError
from tests.conformance.adapters import ADAPTERS, Bench, pairs, prompts, texts

pytestmark = pytest.mark.engine
BATCH_SIZES = (1, 4, "auto")

QUESTION = "Question: What is Iceland?\nAnswer:"
LONG = "Iceland is an island country in the North Atlantic Ocean. " * 13  # longer than the model's context
REQUESTS = pairs(
    (QUESTION, " an island"),
    (QUESTION, " a"),  # one token
    (QUESTION, " a volcano in the sea"),
    (QUESTION, " b"),
    ("", "The capital of Iceland is Reykjavik."),  # no context
    ("", "x"),
    ("The capital ", "of Iceland"),  # a space at the context's end belongs to the continuation
    (LONG, " the end"),  # cut from the left
    (LONG[:-1], "."),
    ("A context of more than a few tokens", " and " + LONG[:450]),  # a continuation that leaves little room for it
    ("Þingvellir — ", "þjóðgarður 🌋 火山"),  # characters of several tokens
    (QUESTION, " an island"),  # the same again
)
TEXTS = texts(LONG, "Short.", "x", "Þingvellir 🌋 火山", LONG[:777], "a  b\n\n\tc")


def assert_close(ours: Any, theirs: Any, rel: float = 1e-4) -> None:
    """Sums of log-probabilities agree relative to their size, and the greedy matches exactly."""
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], rtol=rel, atol=1e-6)
    assert [bool(g) for _, g in ours] == [bool(g) for _, g in theirs]


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_as_hf(bench: Bench, name: str, batch_size: int | str) -> None:
    model = bench.model(name, batch_size=batch_size)
    ours = model.loglikelihood(REQUESTS, disable_tqdm=True)
    assert_close(ours, bench.first("pairs", lambda: bench.stock().loglikelihood(REQUESTS, disable_tqdm=True)))
    first = bench.first((name, "pairs"), lambda: ours)  # those of batch size 1, unless this test runs alone
    assert_close(ours, first, rel=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_greedy_continuation_is_told(bench: Bench, name: str) -> None:
    (made,) = bench.stock().generate_until(prompts(QUESTION, max_gen_toks=4), disable_tqdm=True)
    requests = pairs((QUESTION, made), (QUESTION, made + " and more"))
    ours = bench.model(name).loglikelihood(requests, disable_tqdm=True)
    assert_close(ours, bench.stock().loglikelihood(requests, disable_tqdm=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_order_does_not_matter(bench: Bench, name: str) -> None:
    order = list(range(len(REQUESTS)))
    random.Random(3).shuffle(order)
    model = bench.model(name, batch_size=4)
    straight = model.loglikelihood(REQUESTS, disable_tqdm=True)
    shuffled = model.loglikelihood([REQUESTS[i] for i in order], disable_tqdm=True)
    assert_close(shuffled, [straight[i] for i in order], rel=1e-5)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_rolling_as_hf(bench: Bench, name: str, batch_size: int | str) -> None:
    ours = bench.model(name, batch_size=batch_size).loglikelihood_rolling(TEXTS, disable_tqdm=True)
    stock = bench.first("texts", lambda: bench.stock().loglikelihood_rolling(TEXTS, disable_tqdm=True))
    np.testing.assert_allclose(ours, stock, rtol=1e-4)
    np.testing.assert_allclose(ours, bench.first((name, "texts"), lambda: ours), rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_empty_text_rolls_to_nothing(bench: Bench, name: str) -> None:
    assert bench.model(name).loglikelihood_rolling(texts(""), disable_tqdm=True) == [0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_context_of_white_space_is_no_context(bench: Bench, name: str) -> None:
    """The harness moves it to the continuation; stock `hf` then fails, with no token before the first to predict."""
    with pytest.raises(AssertionError):
        bench.stock().loglikelihood(pairs(("\n ", "line")), disable_tqdm=True)
    expected = bench.stock().loglikelihood(pairs(("", "\n line")), disable_tqdm=True)
    assert_close(bench.model(name).loglikelihood(pairs(("\n ", "line")), disable_tqdm=True), expected)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("Iceland is", ""), r"continuation '' of request 0 has no tokens"),
        (("x", LONG), r"continuation .* of request 0 has \d+ tokens, the model 256"),
    ],
)
def test_what_cannot_be_scored_is_an_error(bench: Bench, name: str, request_: tuple[str, str], words: str) -> None:
    """Stock `hf` has a bare assertion here, stock `vllm` a figure for another text."""
    with pytest.raises(UserError, match=words):
        bench.model(name).loglikelihood(pairs(request_), disable_tqdm=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_borders_between_context_and_continuation(bench: Bench, name: str) -> None:
    """The same tokens three times, scored from another border each: lm-eval 0.4.13's `hf` mixes them up."""
    words = " an island in the sea"
    requests = pairs(*((QUESTION + words[:n], words[n:]) for n in (0, 3, 10)))
    expected = [bench.stock().loglikelihood([r], disable_tqdm=True)[0] for r in requests]
    assert_close(bench.model(name).loglikelihood(requests, disable_tqdm=True), expected)
