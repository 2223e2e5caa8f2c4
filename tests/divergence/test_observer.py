"""Observers of logits: parts of windows in any order and size, and the same figures for any chunk."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmeval_ext.divergence import observer as module
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.logits_code import decode, encode
from lmeval_ext.divergence.measure import TokenDivergence, fetched, token_divergence
from lmeval_ext.divergence.observer import Comparing, Saving, Upload, WindowSpan, chunk_tokens, spans_between
from lmeval_ext.divergence.plan import _uploaded, cut_head
from lmeval_ext.divergence.store import StoredWindow
from tests.divergence.stores import random

TOKENS, WIDTH, VOCABULARY = 40, 16, 700  # more tokens than coded logits store exactly

lists_of_spans = st.lists(
    st.builds(WindowSpan, st.sampled_from("abcd"), st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=8
)


def tokens_of(spans: list[WindowSpan]) -> list[tuple[str, int]]:
    return [(s.window, s.start + i) for s in spans for i in range(s.tokens)]


@given(lists_of_spans, st.lists(st.integers(0, 80), max_size=6))
def test_pieces_of_spans_join_to_the_spans(spans: list[WindowSpan], cuts: list[int]) -> None:
    total = sum(s.tokens for s in spans)
    edges = [0, *sorted(min(c, total) for c in cuts), total]
    pieces = [spans_between(spans, a, b) for a, b in itertools.pairwise(edges)]
    assert tokens_of([s for piece in pieces for s in piece]) == tokens_of(spans)
    for piece, (a, b) in zip(pieces, itertools.pairwise(edges), strict=True):
        assert tokens_of(piece) == tokens_of(spans)[a:b]
        assert all(s.tokens > 0 for s in piece)


def test_spans_between_by_hand() -> None:
    spans = [WindowSpan("a", 10, 3), WindowSpan("b", 0, 4)]
    assert spans_between(spans, 2, 5) == [WindowSpan("a", 12, 1), WindowSpan("b", 0, 2)]
    assert spans_between(spans, 6, 100) == [WindowSpan("b", 3, 1)]
    assert spans_between(spans, 7, 9) == []


def test_chunk_is_the_argument_or_bounded_by_memory() -> None:
    assert chunk_tokens(150_000, 1) == 1
    assert chunk_tokens(150_000, 7) == 7
    assert chunk_tokens(150_000) * 150_000 * 4 <= 128 << 20
    assert chunk_tokens(10**9) == 16


# ---------------------------------------------------------------------- saving


def head(dtype: torch.dtype = torch.float32) -> OutputHead:
    return OutputHead(random(VOCABULARY, WIDTH).to(dtype), softcap=20.0)


def case(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits (with 5 columns of padding) and targets."""
    hidden = random(TOKENS, WIDTH, seed=seed)
    logits = torch.nn.functional.pad(head().logits(hidden) + 0.1 * random(TOKENS, VOCABULARY), (0, 5), value=1e4)
    return hidden, logits, torch.arange(TOKENS) * 7 % VOCABULARY


def fed(saving: Saving, parts: list[slice], window: str = "w") -> None:
    hidden, logits, targets = case()
    for part in parts:
        span = WindowSpan(window, part.start, part.stop - part.start)
        saving.observe([span], hidden[part], logits[part], targets[part])


@pytest.mark.parametrize("mode", ["hidden", "logits"])
@pytest.mark.parametrize(
    "parts",
    [
        [slice(0, 40)],
        [slice(0, 13), slice(13, 40)],
        [slice(30, 40), slice(0, 13), slice(13, 30)],  # out of order
        [slice(0, 25), slice(10, 40)],  # overlapping: preempted, and computed again from an earlier token
    ],
)
def test_parts_of_a_window_are_joined(mode: str, parts: list[slice]) -> None:
    saving = Saving(head() if mode == "hidden" else None, VOCABULARY, chunk=8)
    fed(saving, parts)
    hidden, logits, _ = case()
    expected = {"hidden": hidden} if mode == "hidden" else encode(logits[:, :VOCABULARY])
    assert saving.has(["w"])
    states = saving.take("w", TOKENS)
    assert set(states) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(states[name], tensor), name
    assert not saving.has(["w"])


def test_last_states_of_a_repeated_part_count() -> None:
    saving = Saving(head(), VOCABULARY)
    hidden, logits, targets = case()
    for factor in (2.0, 1.0):  # as if the first came from a batch that ran out of memory
        saving.observe([WindowSpan("w", 0, TOKENS)], factor * hidden, logits, targets)
    assert torch.equal(saving.take("w", TOKENS)["hidden"], hidden)


@pytest.mark.parametrize("parts", [[], [slice(0, 39)], [slice(1, 40)], [slice(0, 10), slice(20, 40)]])
def test_missing_parts_are_an_error(parts: list[slice]) -> None:
    saving = Saving(head(), VOCABULARY)
    fed(saving, parts)
    missing = TOKENS - sum(p.stop - p.start for p in parts)
    with pytest.raises(RuntimeError, match=f"window w: states of {missing} of 40 tokens are missing"):
        saving.take("w", TOKENS)


def test_missing_hidden_states_are_an_error() -> None:
    _, logits, targets = case()
    with pytest.raises(ValueError, match="no hidden states"):
        Saving(head(), VOCABULARY).observe([WindowSpan("w", 0, TOKENS)], None, logits, targets)


def test_windows_of_one_step_are_separated() -> None:
    """One step of an engine may hold the end of a window and the start of another."""
    saving = Saving(head(), VOCABULARY, chunk=9)
    hidden, logits, targets = case()
    step = [WindowSpan("a", 5, 15), WindowSpan("b", 0, 25)]
    saving.observe(step, hidden, logits, targets)
    saving.observe([WindowSpan("a", 0, 5)], hidden[:5] + 1, logits[:5], targets[:5])
    assert torch.equal(saving.take("a", 20)["hidden"], torch.cat([hidden[:5] + 1, hidden[:15]]))
    assert torch.equal(saving.take("b", 25)["hidden"], hidden[15:])


def test_saving_measures_the_engine_against_the_kept_states() -> None:
    hidden, logits, targets = case()
    divergence = Saving(head(), VOCABULARY, chunk=7).observe([WindowSpan("w", 0, TOKENS)], hidden, logits, targets)
    expected = token_divergence(head().logits(hidden), logits, targets, VOCABULARY)
    np.testing.assert_allclose(divergence.kld, expected.kld, atol=1e-6)
    coded = Saving(None, VOCABULARY, chunk=7).observe([WindowSpan("w", 0, TOKENS)], None, logits, targets)
    expected = token_divergence(decode(encode(logits[:, :VOCABULARY])), logits, targets, VOCABULARY)
    np.testing.assert_allclose(coded.kld, expected.kld, atol=1e-6)


# ---------------------------------------------------------------------- comparing


LoadHead = Callable[[], OutputHead] | None


def stored(mode: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, StoredWindow], LoadHead]:
    """Two windows of 20 tokens, and the function that returns their output matrix."""
    hidden = case()[0].to(dtype)
    states = {"hidden": hidden} if mode == "hidden" else encode(head(dtype).logits(hidden))
    windows = {
        key: StoredWindow(key, {name: t[20 * i : 20 * i + 20] for name, t in states.items()}, {})
        for i, key in enumerate("ab")
    }
    return windows, (lambda: head(dtype)) if mode == "hidden" else None


BOTH = [WindowSpan("a", 0, 20), WindowSpan("b", 0, 20)]


def compared(mode: str, chunk: int | None, dtype: torch.dtype = torch.float32) -> TokenDivergence:
    windows, matrix = stored(mode, dtype)
    _, logits, targets = case()
    return Comparing(windows, matrix, VOCABULARY, chunk).observe(BOTH, None, logits, targets)


def assert_close(a: Any, b: Any) -> None:
    assert torch.equal(a.agree, b.agree)
    for name in ("kld", "reference_logprobs", "confidence"):
        rounding = 0 if name == "kld" else 1e-6  # log-probabilities of unlikely tokens are large numbers
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rounding, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 41, 1000])
def test_any_chunk_gives_the_same_within_1e_6(chunk: int, dtype: torch.dtype) -> None:
    """Not to the last bit: a matrix product adds in another order for another number of rows."""
    assert_close(compared("hidden", chunk, dtype), compared("hidden", None, dtype))


@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 1000])
def test_any_chunk_of_coded_logits_gives_the_same_to_the_last_bit(chunk: int) -> None:
    """Coded logits need no matrix product."""
    for a, b in zip(compared("logits", chunk), compared("logits", None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["hidden", "logits"])
def test_comparing_takes_parts_of_windows_in_any_order(mode: str) -> None:
    """An engine's steps have any parts of windows; each token is measured against its own distribution."""
    windows, matrix = stored(mode)
    _, logits, targets = case()
    comparing, expected = Comparing(windows, matrix, VOCABULARY, 6), compared(mode, None)
    step = [WindowSpan("b", 11, 9), WindowSpan("a", 3, 5)]
    rows = torch.tensor([*range(31, 40), *range(3, 8)])
    divergence = comparing.observe(step, None, logits[rows], targets[rows])
    assert_close(divergence, TokenDivergence(*(t[rows] for t in expected)))
    assert (fetched(divergence)["kld"] > 1e-4).all()


def test_divergence_of_a_reference_from_itself_is_zero() -> None:
    windows, matrix = stored("hidden")
    logits = head().logits(case()[0])
    divergence = Comparing(windows, matrix, VOCABULARY, 5).observe(BOTH, None, logits, case()[2])
    np.testing.assert_allclose(divergence.kld, 0, atol=1e-6)
    assert divergence.agree.all()


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output matrix computes no more than `chunk` rows of the reference's logits at once."""
    windows, matrix = stored("hidden")
    rows = list[int]()
    _, logits, targets = case()
    logits_of = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda self, h, reuse=False: rows.append(len(h)) or logits_of(self, h))  # type: ignore[func-returns-value]
    Comparing(windows, matrix, VOCABULARY, 16).observe(BOTH, None, logits, targets)
    assert rows == [16, 16, 8]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 20 * VOCABULARY * 4)
    rows.clear()
    Comparing(windows, matrix, VOCABULARY).observe(BOTH, None, logits, targets)
    assert rows == [20, 20]


def test_windows_of_a_step_are_not_all_in_memory_at_once() -> None:
    """A window of coded logits has 200 MB, and a GPU's step many windows. Two are in memory, the last and the next."""
    stored_windows, _ = stored("logits")
    arrays_returned: list[
        weakref.ref[np.ndarray]
    ] = []  # the arrays, which the tensors and all their parts keep in memory

    class Fresh(dict[str, StoredWindow]):
        def __getitem__(self, key: str) -> StoredWindow:
            window = stored_windows[key]
            assert all(memory() is None for memory in arrays_returned[: -len(window.states)])
            fresh = {name: tensor.numpy().copy() for name, tensor in window.states.items()}
            arrays_returned.extend(map(weakref.ref, fresh.values()))
            return StoredWindow(key, {name: torch.from_numpy(array) for name, array in fresh.items()}, window.scores)

    _, logits, targets = case()
    thirds = [WindowSpan("a", 0, 20), WindowSpan("b", 0, 15), WindowSpan("b", 15, 5)]
    divergence = Comparing(Fresh(), None, VOCABULARY, 6).observe(thirds, None, logits, targets)
    assert len(arrays_returned) == 3 * 4
    assert_close(divergence, compared("logits", None))


def test_head_stays_where_it_is_if_gpu_memory_is_short() -> None:
    """Scoring can then free memory by halving its batches, which it could not if the background thread raised again."""

    class Full(Upload):
        def copied(self, head: OutputHead) -> OutputHead:
            raise torch.cuda.OutOfMemoryError

    unmoved = head()
    assert _uploaded(unmoved, Full(torch.device("cpu"))) is unmoved


def test_divergence_is_over_the_common_vocabulary() -> None:
    """Both distributions are renormalized over the tokens that they share."""
    windows, matrix = stored("hidden")
    assert matrix is not None
    _, logits, targets = case()
    common = 650
    divergence = Comparing(windows, matrix, common).observe(BOTH, None, logits, targets % common)
    expected = token_divergence(head().logits(case()[0])[:, :common], logits[:, :common], targets % common, common)
    assert_close(divergence, expected)
    cut = cut_head(OutputHead(head().weight, random(VOCABULARY), 20.0, 0.5), common)
    assert (cut.weight.shape[0], cut.bias.shape[0], cut.softcap, cut.scale) == (common, common, 20.0, 0.5)  # type: ignore[union-attr]
