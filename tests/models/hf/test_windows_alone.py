"""A score depends on its window alone: not on other rows, their order, what ran before, or max_length."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.requests import WindowRequest, window_request
from tests.architectures.checkpoints import CONTEXT, make_checkpoint, windows

pytestmark = pytest.mark.engine

# Rotary types that look at the longest row, sliding windows, recurrent layers, experts, positions of a wrapper
NAMES = ("llama-dynamic", "phi3-longrope", "gemma2", "falcon-h1", "qwen3-next", "gpt-oss", "jamba")
LENGTHS = (80, 20, 60, 44)  # on both sides of the original context of 48 tokens, and of the sliding window of 24


def request(ids: list[int], context: int = 1) -> WindowRequest:
    return window_request(str(len(ids)), ids, context, {}, ("text", len(ids), context))


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_the_window_alone(name: str, tmp_path: Path) -> None:
    plain = make_checkpoint(name, tmp_path)
    rows = [ids for length in LENGTHS for ids in windows(2, length)]
    expected = {tuple(ids): plain(ids) for ids in rows}
    model = get_model("hf_quant")(
        pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=2, max_length=CONTEXT
    )

    def check(order: list[list[int]]) -> None:
        for ids, scores in zip(order, model.score_windows([request(ids) for ids in order]), strict=True):
            np.testing.assert_allclose(scores.logprobs, expected[tuple(ids)], atol=1e-4)

    check(rows)
    for seed in range(3):
        check(random.Random(seed).sample(rows, len(rows)))
    for ids in rows:
        check([ids])
    model._max_length = max(LENGTHS)  # any max_length that the windows fit
    check(rows)


@pytest.mark.parametrize("name", NAMES)
def test_choices_and_texts_depend_on_themselves_alone(name: str, tmp_path: Path) -> None:
    """The harness' own requests: rows of other lengths in the batch, shared contexts, and what ran before."""
    plain = make_checkpoint(name, tmp_path)
    rows = [ids for length in LENGTHS for ids in windows(1, length)]
    triples: list[Any] = [(None, ids[:-5], ids[-5:]) for ids in rows]
    triples += [(None, rows[0][:70], ids[:3]) for ids in rows]  # a shared context
    model = get_model("hf_quant")(
        pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=4, max_length=CONTEXT
    )
    for order in (triples, triples[::-1], triples[3:] + triples[:3]):
        results = model._loglikelihood_tokens(order, disable_tqdm=True)
        for (_, context, continuation), (total, _) in zip(order, results, strict=True):
            expected = plain(context + continuation)[-len(continuation) :].sum()
            assert total == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_frequencies_of_these_models_depend_on_the_length(name: str, tmp_path: Path) -> None:
    """Beside a longer row, Transformers gives a short one another score: the tests above can fail."""
    import torch

    plain = make_checkpoint(name, tmp_path)
    model, (ids,) = plain.args[0], windows(1, 40)
    padded = torch.tensor([ids + [2] * 60, windows(1, 100)[0]])
    with torch.no_grad():
        logits = model(padded).logits[0, :39].double()
    scores = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    assert np.abs(scores - plain(ids)).max() > 0.01


def test_dynamic_frequencies_are_those_of_the_text_while_it_is_generated(tmp_path: Path) -> None:
    make_checkpoint("llama-dynamic", tmp_path)
    model = get_model("hf_quant")(
        pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=3, max_length=CONTEXT
    )
    from lm_eval.api.instance import Instance

    def generated(*texts: str) -> list[str]:
        arguments = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
        requests = [Instance("generate_until", {}, (text, dict(arguments)), i) for i, text in enumerate(texts)]
        return list(model.generate_until(requests, disable_tqdm=True))

    prompts = ["Iceland is", "A volcano erupts in the north of the island. " * 3, "The capital of the country is"]
    alone = [generated(prompt)[0] for prompt in prompts]
    assert generated(*prompts) == alone
    assert generated(*prompts[::-1]) == alone[::-1]
