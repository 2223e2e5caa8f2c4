"""BOS and the prefix token: one rule, that of the harness' `hf`, on every adapter and in the result file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conformance.adapters import ADAPTERS, Bench, pairs, prompts, texts

pytestmark = pytest.mark.engine

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"prefix_token_id": 1},
    {"prefix_token_id": 1, "add_bos_token": True},
]
TEXTS = ("Iceland", "<s>Iceland", "</s>x", " a b", "<s>", "1")
BOS, EOS = 0, 1


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_as_hf(bench: Bench, name: str, bos: bool, arguments: dict[str, Any]) -> None:
    ours, theirs = bench.model(name, bos, **arguments), bench.stock(bos, **arguments)
    for text in TEXTS:
        for special in (None, False):
            assert list(ours.tok_encode(text, add_special_tokens=special)) == theirs.tok_encode(text, special), text
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)

    requests = pairs(("", "The capital"), ("A volcano", " erupts"), ("<s>A volcano", " erupts"), ("</s>A", " b"))
    (a, b), (c, d) = (zip(*m.loglikelihood(requests, disable_tqdm=True), strict=True) for m in (ours, theirs))
    np.testing.assert_allclose(a, c, rtol=1e-4)
    assert list(b) == list(d)
    rolling = texts("The capital of Iceland", "<s>The capital")
    np.testing.assert_allclose(
        *(m.loglikelihood_rolling(rolling, disable_tqdm=True) for m in (ours, theirs)), rtol=1e-4
    )


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("bos", [True, False])
def test_llamacpp_with_a_tokenizer_of_transformers(bench: Bench, bos: bool, arguments: dict[str, Any]) -> None:
    ours = bench.model("llamacpp", bos, tokenizer=str(bench.folder(bos)), **arguments)
    theirs = bench.stock(bos, **arguments)
    for text in TEXTS:
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), text
    assert ours.generate_until(prompts("<s>Iceland: 1", max_gen_toks=3), disable_tqdm=True) == ["é of"]


@pytest.mark.parametrize(
    ("bos", "arguments", "before_text", "prefix"),
    [
        (True, {}, [BOS], BOS),
        (False, {}, [], BOS),
        (True, {"add_bos_token": False}, [], BOS),
        (False, {"prefix_token_id": EOS}, [], EOS),
    ],
)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_rule_is_in_the_result(
    bench: Bench, name: str, bos: bool, arguments: dict[str, Any], before_text: list[int], prefix: int
) -> None:
    record = bench.model(name, bos, **arguments).get_model_info()["quantization"]["bos"]
    assert record == {
        "before_text": before_text, "prefix_token_id": prefix, "add_bos_token": arguments.get("add_bos_token"),
    }  # fmt: skip


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_prompt_is_encoded_alike_in_any_company(bench: Bench, name: str, bos: bool, monkeypatch: Any) -> None:
    """Stock `hf` asks only the first prompt of a batch whether it begins with BOS."""
    model, encoded = bench.model(name, bos, batch_size=4), []
    original = type(model).tok_encode

    def spy(self: Any, string: Any, *args: Any, **kwargs: Any) -> Any:
        ids = original(self, string, *args, **kwargs)
        encoded.extend(zip(string, ids, strict=True) if not isinstance(string, str) else [(string, ids)])
        return ids

    monkeypatch.setattr(type(model), "tok_encode", spy)
    starts = ["<s>Iceland: 1", "Iceland: 1"]
    answers = model.generate_until(prompts(*starts, max_gen_toks=3), disable_tqdm=True)
    assert answers == ["é of"] * 2
    lengths = {text: len(ids) for text, ids in encoded}
    assert lengths[starts[0]] - lengths[starts[1]] == (0 if bos else 1)
