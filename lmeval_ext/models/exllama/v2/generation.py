"""ExLlamaV2's dynamic generator as a `JobGenerator`."""

from __future__ import annotations

from typing import Any

import torch
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler

from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.sampling import Sampling


class ExLlamaV2Generator:
    """ExLlamaV2's dynamic generator; `wrapped` is the engine's own object.

    paged: whether flash-attn is installed. Without it the cache is not paged, and prompts run one after the other.
    """

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int, paged: bool) -> None:
        self.cache_tokens = int(cache.max_seq_len)
        self.wrapped = ExLlamaV2DynamicGenerator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs if paged else 1,
            max_q_size=1,
            paged=paged,
        )

    def submit(self, job: GenerationJob) -> None:
        self.wrapped.enqueue(
            ExLlamaV2DynamicJob(
                input_ids=torch.tensor([job.ids], dtype=torch.long),
                max_new_tokens=job.max_new,
                gen_settings=sampler(job.sampling),
                seed=job.seed,
                stop_conditions=job.stop_conditions,
                identifier=job.index,
            )
        )

    def step(self) -> list[dict[str, Any]]:
        return list(self.wrapped.iterate())

    def clear(self) -> None:
        for job in [*self.wrapped.active_jobs, *self.wrapped.pending_jobs]:
            self.wrapped.cancel(job)


def sampler(sampling: Sampling) -> Any:
    """Returns ExLlamaV2Sampler.Settings; its defaults (temperature 0.8, top-k 50, repetition penalty) are replaced."""
    greedy = sampling.temperature == 0.0
    return ExLlamaV2Sampler.Settings(
        temperature=1.0 if greedy else sampling.temperature,
        top_k=1 if greedy else sampling.top_k,
        top_p=0.0 if greedy else sampling.top_p,
        min_p=sampling.min_p,
        token_repetition_penalty=sampling.repetition_penalty,
        token_presence_penalty=sampling.presence_penalty,
        token_frequency_penalty=sampling.frequency_penalty,
    )
