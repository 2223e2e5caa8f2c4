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
from lmeval_ext.models.sampling import Sampling


@dataclass
class GenerationJob:
    """One text to go on from. ids: its tokens. max_new: the most tokens to add. stop_tokens, stop_strings: its end."""

    index: int
    ids: list[int]
    max_new: int
    stop_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = field(default_factory=lambda: random.getrandbits(32))  # the harness' --seed seeds `random`


class Generator(Protocol):
    """An engine's dynamic generator. cache_tokens: what its cache holds, over all jobs."""

    cache_tokens: int

    def submit(self, prompt: GenerationJob) -> None:
        """Queue a job; `identifier` in its results is the prompt's index."""

    def step(self) -> list[dict[str, Any]]:
        """One iteration; results as the engines give them (stage, identifier, eos, token_ids, held, error)."""
        ...

    def clear(self) -> None:
        """Drop all jobs."""


def check_cache(prompts: Sequence[GenerationJob], cache_tokens: int) -> None:
    """Raises UserError where a prompt and its answer do not fit into the cache. The engines need two tokens more."""
    longest = max((len(p.ids) + p.max_new + 2 for p in prompts), default=0)
    if longest > cache_tokens:
        needed = -(-longest // 256) * 256
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the KV cache holds {cache_tokens}; set "
            f"cache_tokens={needed} or more, or lower max_gen_toks or max_length"
        )


def generate(generator: Generator, prompts: Sequence[GenerationJob]) -> Iterator[tuple[int, list[int]]]:
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
