"""ExLlamaV3's dynamic generator as a `JobGenerator`."""

from __future__ import annotations

from typing import Any

import exllamav3
import torch
from exllamav3 import Job
from exllamav3.generator.sampler import ArgmaxSampler, ComboSampler

from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.sampling import Sampling


class ExLlamaV3Generator:
    """ExLlamaV3's dynamic generator; `wrapped` is the engine's own object.

    Its cache is paged, batching is continuous, and pages that prompts share are computed once.
    """

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int) -> None:
        self.cache_tokens = int(cache.max_num_tokens)
        # No cooldown: latency of the first tokens does not matter here, so prompts are computed as they come
        self.wrapped = exllamav3.Generator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs,
            max_chunk_size=2048,
            shared_chunk_size=2048,
            prefill_cooldown=0,
        )

    def submit(self, job: GenerationJob) -> None:
        self.wrapped.enqueue(
            Job(
                input_ids=torch.tensor([job.ids], dtype=torch.long),
                max_new_tokens=job.max_new,
                sampler=sampler(job.sampling),
                seed=job.seed,
                stop_conditions=job.stop_conditions,
                identifier=job.index,
            )
        )

    def step(self) -> list[dict[str, Any]]:
        return list(self.wrapped.iterate())

    def clear(self) -> None:
        self.wrapped.clear_queue()

    def close(self) -> None:
        self.wrapped.close()


def sampler(sampling: Sampling) -> Any:
    """Returns a sampler that applies temperature first, then min-p, top-k and top-p, in Transformers' order."""
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.temperature == 0.0 and penalties == (1.0, 0.0, 0.0):
        return ArgmaxSampler()
    return ComboSampler(
        rep_p=sampling.repetition_penalty,
        pres_p=sampling.presence_penalty,
        freq_p=sampling.frequency_penalty,
        temperature=sampling.temperature,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
