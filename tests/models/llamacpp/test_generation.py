"""llama.cpp's answers: decoders that strip a first space, tokens of many bytes, answers that leave no room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.generation import generate, sampling

WORDS = ["▁The", "▁quick", "▁fo", "x", "▁STOP", "▁jumps"]


class Spoken:
    """Says the tokens that it was made of."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def set_seed(self, seed: int) -> None: ...

    def generate(self, prompt: list[int], **arguments: Any) -> Iterator[int]:
        yield from self.ids


def metaspace() -> Tokenizer:
    """As Llama 2's: ▁ for a space, and a text's first space is none."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("said", [[0, 1, 2, 3], [0], [3, 3, 5], []])
def test_spaces_between_tokens_stay(said: list[int]) -> None:
    decode = metaspace().decode
    assert generate(Spoken(said), [1], 10, set(), [], {}, decode) == decode(said)
    assert decode([0, 1, 2, 3]) == "The quick fox"


def test_a_stop_sequence_over_a_stripped_space() -> None:
    """The text goes on up to the token that completes it; the harness cuts there."""
    text = generate(Spoken([0, 1, 4, 5]), [1], 10, set(), ["k ST"], {}, metaspace().decode)
    assert text == "The quick STOP"


def test_sampling_without_a_temperature_is_at_1() -> None:
    assert sampling({"do_sample": True})["temp"] == 1.0
    assert sampling({"do_sample": True, "temperature": 0.5})["temp"] == 0.5
    assert sampling({})["temp"] == 0.0


@pytest.mark.engine
def test_tokens_of_more_than_32_bytes_have_their_bytes(bf16_gguf: Path, smollm2: Path) -> None:
    """Runs of spaces, of which code is full. Transformers' own vocabulary says which bytes a token is."""
    from transformers import AutoTokenizer

    from lmeval_ext.models.llamacpp.vocabulary import GGUFTokenizer

    ours, theirs = GGUFTokenizer(str(bf16_gguf)), AutoTokenizer.from_pretrained(smollm2)
    long = [i for i in range(len(theirs)) if len(theirs.decode([i]).encode()) > 32]
    assert len(long) > 10
    for i in long:
        assert ours.bytes_of(i).decode() == theirs.decode([i])


@pytest.mark.engine
def test_an_answer_that_leaves_no_room(bf16_gguf: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    model = get_model("llamacpp")(pretrained=str(bf16_gguf), max_length=64)
    asked = Instance("generate_until", {}, ("A prompt", {"until": ["."], "max_gen_toks": 64}), 0)
    with pytest.raises(UserError, match="max_gen_toks=64"):
        model.generate_until([asked], disable_tqdm=True)
