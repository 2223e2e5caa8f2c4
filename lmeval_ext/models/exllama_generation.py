"""`generate_until` on the engines' own dynamic generators: prompts become jobs, token ids come back.

Both generators take token ids and give token ids; texts are encoded and decoded with the checkpoint's Transformers
tokenizer, so that they are those of the harness' `hf`. The engine's own tokenizer only looks out for stop strings.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmeval_ext.errors import UserError

# Generation arguments of the harness and of Transformers that change nothing here, with the values that they may have.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False, None),
    "use_cache": (True, False, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "length_penalty": (1, 1.0, None),
    "early_stopping": (True, False, None),
    "skip_special_tokens": (True, None),
    "spaces_between_special_tokens": (True, False, None),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest. Zero top_k and min_p, and top_p 1, are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Sampling:
        """From the harness' normalized generation arguments. UserError for one that the engines do not have."""
        given = dict(kwargs)
        for name, allowed in _NEUTRAL.items():
            if name in given and given.pop(name) not in allowed:
                raise UserError(f"generation argument {name}={kwargs[name]!r}: the ExLlama engines cannot do that")
        unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise UserError(
                f"generation argument {unknown[0]}={given[unknown[0]]!r} is not known to the ExLlama engines; they "
                f"take {', '.join(cls.__dataclass_fields__)}, until and max_gen_toks"
            )
        if kwargs.get("do_sample") and given.get("temperature") is None:
            given["temperature"] = 1.0  # as in `hf`
        return cls(**{name: type(getattr(cls, name))(value) for name, value in given.items() if value is not None})


@dataclass
class Prompt:
    """One text to go on from. ids: its tokens. max_new: the most tokens to add. stop_tokens, stop_strings: its end."""

    index: int
    ids: list[int]
    max_new: int
    stop_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    sampling: Sampling = Sampling()
    seed: int = field(default_factory=lambda: random.getrandbits(32))  # the harness' --seed seeds `random`


class Generator(Protocol):
    """An engine's dynamic generator. cache_tokens: what its cache holds, over all jobs."""

    cache_tokens: int

    def submit(self, prompt: Prompt) -> None:
        """Queue a job; `identifier` in its results is the prompt's index."""

    def step(self) -> list[dict[str, Any]]:
        """One iteration; results as the engines give them (stage, identifier, eos, token_ids, held, error)."""
        ...

    def clear(self) -> None:
        """Drop all jobs."""


def check_cache(prompts: Sequence[Prompt], cache_tokens: int) -> None:
    """Raises UserError where a prompt and its answer do not fit into the cache. The engines need two tokens more."""
    longest = max((len(p.ids) + p.max_new + 2 for p in prompts), default=0)
    if longest > cache_tokens:
        needed = -(-longest // 256) * 256
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the KV cache holds {cache_tokens}; set "
            f"cache_tokens={needed} or more, or lower max_gen_toks or max_length"
        )


def generate(generator: Generator, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
    """(index, new token ids, the stopping one included) of each prompt, as they finish."""
    check_cache(prompts, generator.cache_tokens)
    tokens: dict[int, list[int]] = collections.defaultdict(list)
    waiting = {prompt.index for prompt in prompts}
    try:
        for prompt in prompts:
            generator.submit(prompt)
        while waiting:
            results = generator.step()
            for result in results:
                index = result.get("identifier")
                if result.get("stage") == "error":
                    raise result["error"]
                if result.get("stage") != "streaming" or index not in waiting:
                    continue
                for part in (result, result.get("held") or {} if result["eos"] else {}):
                    if part.get("token_ids") is not None:
                        tokens[index] += part["token_ids"].flatten().tolist()
                if result["eos"]:
                    waiting.discard(index)
                    yield index, tokens.pop(index, [])
    finally:
        if waiting:  # an error, or nobody wants the rest
            generator.clear()
