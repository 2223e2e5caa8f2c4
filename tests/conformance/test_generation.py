"""`generate_until`: every adapter writes what the harness' `hf` writes in float32, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conformance.adapters import ADAPTERS, Bench, prompts

pytestmark = pytest.mark.engine

LONG = "Iceland is an island country in the North Atlantic Ocean. " * 13
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
