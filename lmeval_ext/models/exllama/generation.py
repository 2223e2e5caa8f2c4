"""Generation on the engines' dynamic generators: prompts become jobs, token ids come back.

Both generators take token ids and return token ids; texts are encoded and decoded with the checkpoint's Transformers
tokenizer, so that they are those of the harness' `hf`. The engine's own tokenizer only watches for stop strings.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.memory import PAGE
from lmeval_ext.models.sampling import Sampling
from lmeval_ext.storage.rounding import round_up


@dataclass
class GenerationJob:
    """One prompt. ids: its tokens. max_new: the most tokens to add. stop_tokens, stop_strings: what ends the text."""

    index: int
    ids: list[int]
    max_new: int
    stop_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = field(default_factory=lambda: random.getrandbits(32))  # the harness' --seed seeds `random`

    @property
    def stop_conditions(self) -> list[int | str]:
        """Both kinds in one list, as both engines take them."""
        return [*self.stop_tokens, *self.stop_strings]


class JobGenerator(Protocol):
    """An engine's dynamic generator. cache_tokens: tokens that its cache holds, over all jobs."""

    cache_tokens: int

    def submit(self, job: GenerationJob) -> None:
        """Queues a job; `identifier` in its results is the job's index."""

    def step(self) -> list[dict[str, Any]]:
        """Runs one iteration; returns the engine's own results (stage, identifier, eos, token_ids, held, error)."""
        ...

    def clear(self) -> None:
        """Drops all jobs."""


def check_cache(jobs: Sequence[GenerationJob], cache_tokens: int) -> None:
    """Raises UserError if a prompt and its new tokens do not fit into the cache. The engines need two tokens more."""
    longest = max((len(job.ids) + job.max_new + 2 for job in jobs), default=0)
    if longest > cache_tokens:
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the KV cache holds {cache_tokens}; set "
            f"cache_tokens={round_up(longest, PAGE)} or more, or lower max_gen_toks or max_length"
        )


def generate(generator: JobGenerator, jobs: Sequence[GenerationJob]) -> Iterator[tuple[int, list[int]]]:
    """Yields (index, new token ids, including the one that stopped it) of each job, as they finish."""
    check_cache(jobs, generator.cache_tokens)
    tokens: dict[int, list[int]] = collections.defaultdict(list)
    waiting = {job.index for job in jobs}
    try:
        for job in jobs:
            generator.submit(job)
        while waiting:
            for result in generator.step():
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
        if waiting:  # an error, or the caller stopped early
            generator.clear()
