"""A loaded ExLlamaV3 model as an `Engine`, and its generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import exllamav3
import torch
from exllamav3 import CacheLayer_fp16, Job
from exllamav3.generator.sampler import ArgmaxSampler, ComboSampler

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.exllama.memory import activation_bytes, gpu_embedding
from lmeval_ext.models.exllama.v3.branches import Branches

PAGE = 256  # exllamav3.constants.PAGE_SIZE


class ExLlamaV3Engine:
    """A loaded model, its cache, and its forward in two parts: body and output matrix. See `Engine`."""

    def __init__(self, model: Any, cache: Any, config: dict[str, Any], embedding_on_gpu: bool | None = None) -> None:
        self.model, self.cache = model, cache
        self.device = torch.device(model.output_device)
        self.vocabulary = int(model.config.vocab_size)
        self.tensor_parallel = bool(model.loaded_tp)
        self._whole = list(model.fwd_modules)
        self._head = next(m for m in model.modules if m.caps.get("logits_output"))
        self.columns = int(getattr(self._head, "out_features", 0) or self.vocabulary)
        self.token_limit: int | None = None
        self.bytes_per_token = activation_bytes(config) + (2 * self.columns if self.tensor_parallel else 0)
        # Main memory is where ExLlamaV3 keeps them; uploading float32 states is 30 % of a small model's time
        self._embedding = (
            None if self.tensor_parallel else gpu_embedding(model.modules[0], model.modules[1].device, embedding_on_gpu)
        )
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        exact = cache is not None and all(type(layer) is CacheLayer_fp16 for layer in cache.layers.values())
        recurrent = bool(model.caps.get("recurrent_states")) or bool(model.get_recurrent_layers())
        self.shares = exact and not recurrent and not self.tensor_parallel and bool(cache.layers)
        self.branches = Branches(self, PAGE) if self.shares else None
        self.cache_is_dirty = False  # scoring wrote into pages that a generator may take for its own

    def enter(self) -> None:
        """ExLlamaV3 computes on whatever stream is current."""

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The model without its output matrix, with its embeddings on the GPU."""
        first = self.model.modules[0]
        kept = getattr(first, "embedding", None), first.device
        self.model.fwd_modules = self._whole[: self._body_length()]
        if self._embedding is not None:
            first.embedding, first.device = self._embedding, self._embedding.weight.device
        try:
            yield
        finally:
            self.model.fwd_modules = self._whole
            if self._embedding is not None:
                first.embedding, first.device = kept

    def _body_length(self) -> int:
        if self._whole[-1][0] is not self._head:
            raise UserError(
                f"{type(self.model).__name__}: its output matrix is not its last module; this ExLlamaV3 "
                f"({exllamav3.__name__} {version()}) is newer than the adapter, tried with 1.6.5"
            )
        return len(self._whole) - 1

    def body(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Hidden states after the last norm, [rows, length, width]."""
        with self._scoring():
            if self._embedding is not None:
                ids = ids.to(self._embedding.weight.device, non_blocking=True)
            return self.model.forward(ids, params)

    def prefill(self, ids: torch.Tensor, params: dict[str, Any]) -> None:
        """Keys and values of a prompt, and nothing else."""
        with self._scoring():
            self.model.prefill(ids, params)

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        params: dict[str, Any] = {"attn_mode": "flash_attn_nc"}
        if self.tensor_parallel:  # its processes return logits only
            return self.model.forward(ids, {**params, "last_tokens_only": keep})
        return self.body(ids, params)[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel:
            return hidden
        # The kernels read plain rows
        return self._head.forward(self._head.prepare_for_device(hidden.contiguous(), {}), {})

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        return self.branches is not None and self.branches.fit(contexts, tails)

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        assert self.branches is not None
        self.cache_is_dirty = True
        return self.branches.run(contexts, tails)


class ExLlamaV3Generator:
    """ExLlamaV3's dynamic generator: paged cache, continuous batching, prompts that share pages computed once."""

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int) -> None:
        self.cache_tokens = int(cache.max_num_tokens)
        # No cooldown: nobody waits for the first words of an answer here, and prompts are computed as they come
        self._generator = exllamav3.Generator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs,
            max_chunk_size=2048,
            shared_chunk_size=2048,
            prefill_cooldown=0,
        )

    def submit(self, prompt: GenerationJob) -> None:
        self._generator.enqueue(
            Job(
                input_ids=torch.tensor([prompt.ids], dtype=torch.long),
                max_new_tokens=prompt.max_new,
                sampler=sampler(prompt),
                seed=prompt.seed,
                stop_conditions=[*prompt.stop_tokens, *prompt.stop_strings],
                identifier=prompt.index,
            )
        )

    def step(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def clear(self) -> None:
        self._generator.clear_queue()

    def close(self) -> None:
        self._generator.close()


def sampler(prompt: GenerationJob) -> Any:
    """Temperature first, then min-p, top-k and top-p, as Transformers orders them."""
    s = prompt.sampling
    penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    if s.temperature == 0.0 and penalties == (1.0, 0.0, 0.0):
        return ArgmaxSampler()
    return ComboSampler(
        rep_p=s.repetition_penalty,
        pres_p=s.presence_penalty,
        freq_p=s.frequency_penalty,
        temperature=s.temperature,
        min_p=s.min_p,
        top_k=s.top_k,
        top_p=s.top_p,
    )


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("exllamav3")
    except metadata.PackageNotFoundError:
        return str(getattr(exllamav3, "__version__", "unknown"))
