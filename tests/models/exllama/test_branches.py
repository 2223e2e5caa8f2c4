"""Contexts that are computed once for several continuations, in ExLlamaV3's pages and in ExLlamaV2's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_model

from tests.conftest import random_ids
from tests.models.exllama.test_exllama import CHOICES, QUESTION, assert_like, pairs
from tests.models.exllama.tiny_engine import PagedTinyEngine, RowTinyEngine, TinyEngine, TinyExLlama

pytestmark = pytest.mark.engine

TOKENS = random_ids(200, seed=3)
BATCHES: list[tuple[list[list[int]], list[list[list[int]]]]] = [  # contexts, tails of each
    ([TOKENS[:40], TOKENS[:50]], [[[5], [6, 7, 8]], [[9, 10], [11], [12]]]),  # a trunk of 40
    ([[*TOKENS[:32], 3, 4, 5]], [[[1, 2, 3]]]),  # cut back to 32, one tail
    ([TOKENS[:48], [*TOKENS[:48], *TOKENS[100:130]]], [[[7], [8]], [[9, 9]]]),  # two pages more, mixed
    ([[3, 4, 5], [6]], [[[7], [8, 9]], [[5, 6, 7]]]),  # nothing shared
    ([[]], [[[7, 8], [9]]]),  # no context
]


def unshared(engine: TinyEngine, contexts: Sequence[list[int]], tails: Sequence[Sequence[list[int]]]) -> torch.Tensor:
    """Returns the hidden states of the tails, each sequence computed from its first token on."""
    return torch.cat(
        [
            engine.model.model(input_ids=torch.tensor([[*context, *tail]])).last_hidden_state[0, -len(tail) :]
            for context, rows in zip(contexts, tails, strict=True)
            for tail in rows
        ]
    )


@pytest.mark.parametrize(("pages", "fitting"), [(64, 5), (18, 4)])
def test_page_branches_equal_whole_sequences(tiny_llama: Path, pages: int, fitting: int) -> None:
    """Full pages are shared, a page in which a context ends is copied, and the trunk is kept."""
    engine = PagedTinyEngine(tiny_llama, pages=pages)
    batches = [batch for batch in BATCHES if engine.fits(*batch)]
    for batch in batches:
        torch.testing.assert_close(engine.branch(*batch), unshared(engine, *batch), rtol=1e-4, atol=1e-4)
    assert len(batches) == fitting


def test_page_branches_compute_the_trunk_again_after_forget(tiny_llama: Path) -> None:
    engine, batch = PagedTinyEngine(tiny_llama), BATCHES[0]
    expected, tokens = engine.branch(*batch), engine.tokens
    engine.branch(*batch)
    kept = engine.tokens - tokens
    for layer in engine.cache.layers.values():  # a generator writes into the same pages
        for tensor in layer.get_tensors():
            tensor.fill_(1e3)
    engine.branches.forget()
    torch.testing.assert_close(engine.branch(*batch), expected)
    assert kept < tokens == engine.tokens - tokens - kept


def test_row_branches_equal_whole_sequences(tiny_llama: Path) -> None:
    """The keys and values of a context are copied to as many rows as it has tails."""
    engine = RowTinyEngine(tiny_llama)
    for batch in BATCHES:
        assert engine.fits(*batch)
        torch.testing.assert_close(engine.branch(*batch), unshared(engine, *batch), rtol=1e-4, atol=1e-4)
    assert engine.branches.cache_bytes == sum(
        rows * length * 2 * 2 * 2 * 16 * 4  # layers × (K, V) × KV heads × head_dim × float32
        for rows, length in ((1, 256), (4, 256))
    )


def test_row_branches_compute_only_tokens_not_in_the_last_context(tiny_llama: Path) -> None:
    engine = RowTinyEngine(tiny_llama)
    contexts = [TOKENS[:40], TOKENS[:50], TOKENS[:30], [*TOKENS[:30], 3, 4]]
    engine.branch(contexts, [[[5], [6]]] * 4)
    assert engine.prefilled == [(TOKENS[:40], 0), (TOKENS[40:50], 40), ([3, 4], 30)]
    engine.branch([[*TOKENS[:30], 3, 4]], [[[7]]])  # the next call begins with what the last one left
    assert len(engine.prefilled) == 3


def test_row_caches_have_the_size_of_one_question(tiny_llama: Path) -> None:
    """Many choices on a short context, then few on a long one: two caches, not one of many rows and a long context."""
    engine = RowTinyEngine(tiny_llama)

    def branch(rows: int, length: int) -> list[tuple[int, int]]:
        """Returns the caches made for a question whose context and padded tails have `length` tokens."""
        engine.caches.clear()
        engine.branch([(TOKENS * 2)[: length - 32]], [[[t] for t in range(rows)]])
        return list(engine.caches)

    assert branch(2, 200) == [(1, 256), (4, 256)]
    assert branch(2, 332) == [(1, 512), (4, 512)]
    assert engine.prefilled[-1][1] == 0  # a new trunk is empty
    assert branch(40, 100) == [(40, 256)]
    assert branch(30, 150) == []  # fits into 40 rows
    prefilled = len(engine.prefilled)
    assert branch(4, 300) == [(4, 512)]
    assert engine.prefilled[prefilled:] == [((TOKENS * 2)[118:268], 118)]  # new leaves leave the trunk as it is


@pytest.mark.parametrize(
    ("contexts", "tails", "fits"),
    [
        ([[3] * 100], [[[5]] * 4], True),
        ([[3] * 500], [[[5]]], False),  # longer than a forward
        ([[3] * 240], [[[5]]], False),  # longer than the model's context
        ([[3] * 10], [[[5]] * 17], False),  # 17 rows of 32 tokens
        ([[3] * 200], [[[5]] * 8], False),  # keys and values of 8 × 232 tokens
        ([[3] * 10, [3] * 240], [[[5]], [[5]]], False),  # every context has to fit
    ],
)
def test_row_branches_fit_into_a_forward_and_its_caches(
    tiny_llama: Path, contexts: list[list[int]], tails: list[list[list[int]]], fits: bool
) -> None:
    assert RowTinyEngine(tiny_llama, token_limit=512, max_length=256).fits(contexts, tails) == fits


@pytest.mark.parametrize("kind", [PagedTinyEngine, RowTinyEngine])
def test_adapter_with_branches_equals_hf(tiny_llama: Path, kind: Any) -> None:
    stock = get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")
    questions = [(f"{QUESTION}{n}", c) for n in ("", " still", " not") for c in CHOICES]
    model = TinyExLlama(str(tiny_llama))
    engine = PagedTinyEngine(tiny_llama, pages=48) if kind is PagedTinyEngine else RowTinyEngine(tiny_llama)
    model.engine = model.scorer.engine = model.batching.engine = engine
    assert_like(model.loglikelihood(pairs(*questions)), stock.loglikelihood(pairs(*questions)))
    assert engine.branched
    context = len(model.tok_encode(QUESTION))
    if isinstance(engine, PagedTinyEngine):
        assert engine.tokens < 3 * context + 12 * 32 + 3 * 64
    else:
        assert sum(len(tokens) for tokens, _ in engine.prefilled) < 2 * context
