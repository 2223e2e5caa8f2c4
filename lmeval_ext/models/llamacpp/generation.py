"""Generation after a prompt, token by token, from `llama_cpp.Llama.generate`.

`Llama.create_completion` handles stop sequences, too, but it does not stop at a special token by its text, drops bytes
that are not UTF-8, samples by default, and decodes the whole answer again after every token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lmeval_ext.models.sampling import known_arguments

# Argument of the harness and Transformers -> (llama.cpp's name, the value that leaves probabilities unchanged)
_SAMPLING: dict[str, tuple[str, Any]] = {
    "temperature": ("temp", 0.0),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "typical_p": ("typical_p", 1.0),
    "repetition_penalty": ("repeat_penalty", 1.0),
    "presence_penalty": ("presence_penalty", 0.0),
    "frequency_penalty": ("frequency_penalty", 0.0),
}


def sampling_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Translates the harness' normalized generation arguments into those of `Llama.generate`.

    Raises UserError for one that llama.cpp does not have.
    """
    known = _SAMPLING | {own: (own, default) for own, default in _SAMPLING.values()}
    given = known_arguments(kwargs, known, "llamacpp", _SAMPLING)
    arguments = dict(_SAMPLING.values())
    if kwargs.get("do_sample"):
        arguments["temp"] = 1.0  # as in `hf`, if do_sample is given without a temperature
    for name, value in given.items():
        own, default = known[name]
        arguments[own] = default if value is None else type(default)(value)
    return arguments


def generate(
    llama: Any,
    prompt: Sequence[int],
    max_new: int,
    ends: Collection[int],
    stops: Sequence[str],
    arguments: dict[str, Any],
    decode: Callable[[list[int]], str],
) -> str:
    """Generates text after `prompt`: max_new tokens, or up to a token of `ends`, or until it contains one of `stops`.

    The stop sequence stays in the text, the ending token does not. arguments: from `sampling_arguments`. decode: gives
    the text of token ids. Samples follow Python's `random`, which the harness' --seed seeds.
    """
    llama.set_seed(random.getrandbits(31))
    longest = max(map(len, stops), default=0)
    ids: list[int] = []
    # settled: text of ids[:end], which no later token changes. ids[start:end] are decoded again together with what
    # follows, because SentencePiece strips the space before the first token that it decodes.
    settled, start, end = "", 0, 0
    for token in llama.generate(list(prompt), **arguments):
        if token in ends:
            break
        ids.append(int(token))
        tail = decode(ids[start:])[len(decode(ids[start:end])) :]
        if any(stop in settled[-longest:] + tail for stop in stops):
            break
        if not tail.endswith("\ufffd"):  # all bytes of the last character are there
            settled, start, end = settled + tail, end if tail else start, len(ids)
        if len(ids) >= max_new:
            break
    return decode(ids)


def generate_ids(
    llama: Any, prompt: Sequence[int], max_new: int, ends: Collection[int], arguments: dict[str, Any]
) -> list[int]:
    """Generates token ids after `prompt`: max_new of them, or up to and including a token of `ends`.

    arguments: from `sampling_arguments`. Samples follow the seed that was set in `llama`.
    """
    ids: list[int] = []
    for token in llama.generate(list(prompt), **arguments):
        ids.append(int(token))
        if token in ends or len(ids) >= max_new:
            break
    return ids
