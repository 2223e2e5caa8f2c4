"""A loaded ExLlamaV2 model as an `Engine`, and its dynamic generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from exllamav2 import ExLlamaV2Cache
from exllamav2 import attn as v2_attention
from exllamav2.compat import safe_move_tensor
from exllamav2.device import set_device_streams
from exllamav2.ext import exllamav2_ext
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler

from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.exllama.memory import activation_bytes, gpu_embedding
from lmeval_ext.models.shared_contexts import common_prefix


class ExLlamaV2Engine:
    """A loaded model and its forward in two parts: body and output matrix. See `Engine`."""

    def __init__(
        self, model: Any, config: dict[str, Any], share: bool = True, embedding_on_gpu: bool | None = None
    ) -> None:
        self.model = model
        self._modules = list(model.modules)
        self._head_at = int(model.head_layer_idx)
        head = self._modules[self._head_at]
        self.device = torch.device(head.device())
        self.vocabulary = int(model.config.vocab_size)
        self.columns = int(head.out_features)
        self.token_limit: int | None = int(model.config.max_input_len * model.config.max_batch_size)
        self.bytes_per_token = activation_bytes(config)
        self.shares = share
        self._cap = model.config.final_logit_softcapping
        self._embedding = gpu_embedding(self._modules[0], self._modules[1].device(), embedding_on_gpu)
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        # Of the context that was computed last, and of the rows of its tails
        self._trunk: Any = None
        self._leaves: Any = None
        self._held: list[int] = []

    def enter(self) -> None:
        """ExLlamaV2 has a stream of its own on every GPU."""
        set_device_streams()
        torch.cuda.set_device(self.device)

    @contextmanager
    def _own_embedding(self) -> Iterator[None]:
        first = self._modules[0]
        kept = first.embedding
        if self._embedding is not None:
            first.embedding = self._embedding
        try:
            yield
        finally:
            first.embedding = kept

    def body(self, ids: torch.Tensor, cache: Any = None, past: int = 0, modules: int | None = None) -> torch.Tensor:
        """Hidden states after the last norm, [rows, length, width], as `ExLlamaV2.forward_chunk` computes them."""
        set_device_streams()
        params = v2_attention.ExLlamaV2Attention.Params(ids.shape[0], ids.shape[1], past, None, None)
        x = ids if self._embedding is None else ids.to(self._embedding.weight.device, non_blocking=True)
        with self._own_embedding():
            for module in self._modules[: self._head_at if modules is None else modules]:
                if module.device_idx is not None and module.device_idx >= 0:
                    x = safe_move_tensor(x, module.device_idx, non_blocking=True)
                x = module.forward(x, cache=cache, attn_params=params, past_len=past, loras=None)
        torch.cuda.set_stream(self.model.get_device_context(x.device.index).stream)
        return x

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return self.body(ids)[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._modules[self._head_at].forward(hidden.contiguous())
        if self._cap:
            exllamav2_ext.softcap_(logits, self._cap)
        return logits

    # ------------------------------------------------------------------ several continuations on one context

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        limit = self.token_limit or 0
        longest = max(len(c) + _padded(max(map(len, t))) for c, t in zip(contexts, tails, strict=True))
        rows = max(len(t) * _padded(max(map(len, t))) for t in tails)
        room = max(map(len, tails)) * longest  # keys and values of all rows, side by side
        return longest <= min(limit, int(self.model.config.max_seq_len)) and rows <= limit and room <= 2 * limit

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        return torch.cat([part for c, t in zip(contexts, tails, strict=True) for part in self._tails(list(c), t)])

    def _tails(self, context: list[int], tails: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """A context in one cache, what it shares with the last one kept; its tails in the rows of another."""
        length = _padded(max(map(len, tails)))
        self._make_caches(len(tails), len(context) + length)
        kept = min(common_prefix(self._held, context), len(context))
        self._held = self._held[:kept]
        if len(context) > kept:
            self._trunk.current_seq_len = kept
            self.body(torch.tensor([context[kept:]]), self._trunk, kept, modules=self.model.last_kv_layer_idx + 1)
        self._held = context
        n = len(context)
        if n:
            self._trunk.copy_states(self._leaves, 0, n, 0, n, 0, 1, 0, len(tails))
        self._leaves.current_seq_len = n
        ids = torch.zeros((len(tails), length), dtype=torch.int64)
        for i, tail in enumerate(tails):
            ids[i, : len(tail)] = torch.tensor(list(tail))
        hidden = self.body(ids, self._leaves, n)
        return [hidden[i, : len(tail)] for i, tail in enumerate(tails)]

    def _make_caches(self, rows: int, length: int) -> None:
        """Room for `rows` rows of `length` tokens. One question's rows and another's length do not multiply."""
        length = -(-length // 256) * 256
        if self._trunk is None or self._trunk.max_seq_len < length:
            self._trunk, self._held = None, []  # the old one first
            self._trunk = ExLlamaV2Cache(self.model, batch_size=1, max_seq_len=length)
        if self._leaves is None or self._leaves.batch_size < rows or self._leaves.max_seq_len < length:
            self._leaves = None
            self._leaves = ExLlamaV2Cache(self.model, batch_size=max(4, rows), max_seq_len=length)

    def scoring_cache_bytes(self) -> int:
        """What the caches of `branch` take: no part of the model, and none of its KV pool."""
        caches = [c for c in (self._trunk, self._leaves) if c is not None]
        return sum(cache_bytes(c) for c in caches)


class ExLlamaV2Generator:
    """ExLlamaV2's dynamic generator. Without flash-attn it has no paged cache, and does one prompt after the other."""

    def __init__(self, model: Any, cache: Any, tokenizer: Any, max_jobs: int, paged: bool) -> None:
        self.cache_tokens = int(cache.max_seq_len)
        self._generator = ExLlamaV2DynamicGenerator(
            model=model,
            cache=cache,
            tokenizer=tokenizer,
            max_batch_size=max_jobs if paged else 1,
            max_q_size=1,
            paged=paged,
        )

    def submit(self, prompt: GenerationJob) -> None:
        job = ExLlamaV2DynamicJob(
            input_ids=torch.tensor([prompt.ids], dtype=torch.long),
            max_new_tokens=prompt.max_new,
            gen_settings=settings(prompt),
            seed=prompt.seed,
            stop_conditions=[*prompt.stop_tokens, *prompt.stop_strings],
            identifier=prompt.index,
        )
        self._generator.enqueue(job)

    def step(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def clear(self) -> None:
        for job in [*self._generator.active_jobs, *self._generator.pending_jobs]:
            self._generator.cancel(job)


def settings(prompt: GenerationJob) -> Any:
    """ExLlamaV2Sampler.Settings; its own defaults (temperature 0.8, top-k 50, repetition penalty) are undone."""
    s = prompt.sampling
    greedy = s.temperature == 0.0
    return ExLlamaV2Sampler.Settings(
        temperature=1.0 if greedy else s.temperature,
        top_k=1 if greedy else s.top_k,
        top_p=0.0 if greedy else s.top_p,
        min_p=s.min_p,
        token_repetition_penalty=s.repetition_penalty,
        token_presence_penalty=s.presence_penalty,
        token_frequency_penalty=s.frequency_penalty,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    return sum(t.numel() * t.element_size() for t in cache.all_tensors() if t is not None)


def _padded(length: int) -> int:
    return -(-length // 32) * 32
