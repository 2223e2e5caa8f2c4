"""Text after a prompt, token by token, from `llama_cpp.Llama.generate`: what `generate_until` of `llamacpp` rests on.

`Llama.create_completion` would cut stop sequences as well, but it stops at no special token by its text, drops bytes
that are no UTF-8, samples unless told otherwise, and reads the whole answer again after every token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lmeval_ext.models.sampling import known_arguments

# The harness' and Transformers' names: llama.cpp's name, and the value that leaves the probabilities as they are.
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


def sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Llama.generate` from the harness' normalized ones. UserError for one that llama.cpp lacks."""
    known = _SAMPLING | {own: (own, default) for own, default in _SAMPLING.values()}
    given = known_arguments(kwargs, known, "llamacpp", _SAMPLING)
    found = dict(_SAMPLING.values())
    if kwargs.get("do_sample"):
        found["temp"] = 1.0  # as in `hf`, where sampling is asked for and no temperature given
    for name, value in given.items():
        own, default = known[name]
        found[own] = default if value is None else type(default)(value)
    return found


def generate(
    llama: Any,
    prompt: Sequence[int],
    most: int,
    ends: Collection[int],
    stops: Sequence[str],
    arguments: dict[str, Any],
    decode: Callable[[list[int]], str],
) -> str:
    """Text after `prompt`: `most` tokens, or up to a token of `ends`, or until one of `stops` is in it (it stays in).

    arguments: as `sampling` gives them. decode: text of token ids. Samples follow Python's `random`, which the harness'
    --seed seeds.
    """
    llama.set_seed(random.getrandbits(31))
    longest = max(map(len, stops), default=0)
    ids: list[int] = []
    # Text of ids[:fresh], which no later token changes; ids[anchor:fresh] are decoded again with what follows, for
    # SentencePiece strips the space before the first of the tokens that it is given
    settled, anchor, fresh = "", 0, 0
    for token in llama.generate(list(prompt), **arguments):
        if token in ends:
            break
        ids.append(int(token))
        tail = decode(ids[anchor:])[len(decode(ids[anchor:fresh])) :]
        if any(stop in settled[-longest:] + tail for stop in stops):
            break
        if not tail.endswith("\ufffd"):  # no character is waiting for its last bytes
            settled, anchor, fresh = settled + tail, fresh if tail else anchor, len(ids)
        if len(ids) >= most:
            break
    return decode(ids)
