"""Generation in llama.cpp: decoders that strip a first space, tokens of many bytes, sampling arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.generation import generate, sampling_arguments

WORDS = ["▁The", "▁quick", "▁fo", "x", "▁STOP", "▁jumps"]


class FixedTokens:
    """Stands for `llama_cpp.Llama`, and generates given tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def set_seed(self, seed: int) -> None: ...

    def generate(self, prompt: list[int], **arguments: Any) -> Iterator[int]:
        yield from self.ids


def metaspace() -> Tokenizer:
    """Returns a tokenizer like Llama 2's: ▁ stands for a space, and the first space of a text is stripped."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0], [3, 3, 5], []])
def test_spaces_between_tokens_are_kept(ids: list[int]) -> None:
    decode = metaspace().decode
    assert generate(FixedTokens(ids), [1], 10, set(), [], {}, decode) == decode(ids)
    assert decode([0, 1, 2, 3]) == "The quick fox"


def test_stop_sequence_across_a_stripped_space_ends_the_text() -> None:
    """The text includes the token that completes the sequence; the harness cuts it off."""
    text = generate(FixedTokens([0, 1, 4, 5]), [1], 10, set(), ["k ST"], {}, metaspace().decode)
    assert text == "The quick STOP"


def test_sampling_without_a_temperature_uses_1() -> None:
    assert sampling_arguments({"do_sample": True})["temp"] == 1.0
    assert sampling_arguments({"do_sample": True, "temperature": 0.5})["temp"] == 0.5
    assert sampling_arguments({})["temp"] == 0.0


@pytest.mark.engine
def test_tokens_of_more_than_32_bytes_are_complete(bf16_gguf: Path, smollm2: Path) -> None:
    """Such tokens are runs of spaces, common in code; Transformers' vocabulary has the expected bytes."""
    from transformers import AutoTokenizer

    from lmeval_ext.models.llamacpp.vocabulary import GGUFTokenizer

    ours, theirs = GGUFTokenizer(str(bf16_gguf)), AutoTokenizer.from_pretrained(smollm2)
    long = [i for i in range(len(theirs)) if len(theirs.decode([i]).encode()) > 32]
    assert len(long) > 10
    for i in long:
        assert ours.bytes_of(i).decode() == theirs.decode([i])


@pytest.mark.engine
def test_max_gen_toks_as_large_as_the_context_is_an_error(bf16_gguf: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    model = get_model("llamacpp")(pretrained=str(bf16_gguf), max_length=64)
    request = Instance("generate_until", {}, ("A prompt", {"until": ["."], "max_gen_toks": 64}), 0)
    with pytest.raises(UserError, match="max_gen_toks=64"):
        model.generate_until([request], disable_tqdm=True)
