"""`generate_until`: every adapter writes what the harness' `hf` writes in float32, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lmeval_ext.errors import UserError
from lmeval_ext.requests import AnswerSettings, answer_request
from tests.conformance.adapters import ADAPTERS, Bench, prompts

pytestmark = pytest.mark.engine

LONG = "Iceland is an island country in the North Atlantic Ocean. " * 13
END = 1  # </s>
STARTS = ("1", "Iceland: 2", "3", "say 4", "a 5", "Iceland is", "Þ")


def written(model: Any, *starts: str, **kwargs: Any) -> list[str]:
    return list(model.generate_until(prompts(*starts, **kwargs), disable_tqdm=True))


def test_the_model_speaks_as_it_was_told(bench: Bench) -> None:
    """The reference itself, by hand."""
    assert written(bench.stock(), *STARTS[:5], until=["\n\n"], max_gen_toks=6) == [
        "é ofQ:X", "🌋!", "\ufffd+*", "=#%", "\n&;~@^",
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_as_hf(bench: Bench, name: str, batch_size: int | str) -> None:
    model = bench.model(name, batch_size=batch_size)
    for kwargs in ({}, {"max_gen_toks": 3}, {"until": ["Q:", "~", "+", "🌋"]}):
        expected = bench.first(str(kwargs), lambda kwargs=kwargs: written(bench.stock(), *STARTS, **kwargs))
        assert written(model, *STARTS, **kwargs) == expected


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_long_prompt_is_cut_on_the_left(bench: Bench, name: str) -> None:
    for start in (LONG + "5", LONG):
        assert written(bench.model(name), start) == written(bench.stock(), start)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ADAPTERS)
def test_stop_sequences_in_special_tokens(bench: Bench, name: str, batch_size: int) -> None:
    """A special token is no text, but it ends the text where it contains a stop sequence."""
    model = bench.model(name, batch_size=batch_size)
    for until in (["<s>"], ["s>"], ["/s"]):
        expected = [written(bench.stock(), start, until=until)[0] for start in STARTS[:5]]
        assert expected[3] == ("=#%" if until == ["/s"] else "=")
        assert written(model, *STARTS[:5], until=until) == expected


@pytest.mark.parametrize("name", ADAPTERS)
def test_order_does_not_matter(bench: Bench, name: str) -> None:
    order = list(range(len(STARTS)))
    random.Random(1).shuffle(order)
    model = bench.model(name, batch_size=4)
    straight = written(model, *STARTS)
    assert written(model, *(STARTS[i] for i in order)) == [straight[i] for i in order]


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_unless_asked_otherwise(bench: Bench, name: str) -> None:
    """Tasks may leave do_sample and temperature out."""
    requests = prompts("Iceland is", "1")
    for request in requests:
        del request.args[1]["do_sample"]
    expected = written(bench.stock(), "Iceland is", "1")
    assert [bench.model(name).generate_until(requests, disable_tqdm=True) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_empty_prompt_begins_with_the_prefix_token(bench: Bench, name: str) -> None:
    """Stock `hf` cannot run it where the tokenizer adds no BOS."""
    assert written(bench.model(name), "", "1") == written(bench.stock(), "<s>", "1")


def first_choices(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, each by a whole forward in float32: no cache, no generation code."""
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *new]]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("name", ADAPTERS)
def test_token_ids_are_the_first_choices(bench: Bench, name: str) -> None:
    """Without a stop, past the end of the text; with one, up to it; neither by what generation_config.json says."""
    model, stock = bench.model(name), bench.stock()
    if name == "hf_quant":
        model.model.generation_config.repetition_penalty = 10.0
    prompts = [stock.tok_encode(start) for start in STARTS]
    whole = [bench.first(f"ids {p}", lambda p=p: first_choices(stock.model, p, 12)) for p in prompts]
    for stop in (False, True):
        requests = [answer_request("", p, AnswerSettings(12, stop), {}, (None, None, None)) for p in prompts]
        ended = [w[: w.index(END) + 1] if stop and END in w else w for w in whole]
        assert model.generate_token_ids(requests) == ended
    assert any(END in w[:-1] for w in whole)


@pytest.mark.parametrize("name", ["hf_quant", "vllm_nvfp4", "llamacpp"])
def test_sampled_token_ids_follow_the_seed(bench: Bench, name: str) -> None:
    model = bench.model(name)
    ids = bench.stock().tok_encode("Iceland is")

    def sampled(seed: int) -> list[list[int]]:
        settings = AnswerSettings(12, stop=False, temperature=2.0, seed=seed)
        return list(model.generate_token_ids([answer_request("", ids, settings, {}, (None, None, None))]))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize("name", ADAPTERS)
def test_prompt_and_answer_beyond_the_context_are_one_line(bench: Bench, name: str) -> None:
    model = bench.model(name)
    request = answer_request("", [2] * 200, AnswerSettings(100), {}, (None, None, None))
    with pytest.raises(UserError, match="prompt and answer take 300 tokens"):
        model.generate_token_ids([request])
