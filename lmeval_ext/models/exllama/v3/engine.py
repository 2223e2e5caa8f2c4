"""A loaded ExLlamaV3 model as an `Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from exllamav3 import CacheLayer_fp16

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.engine import Tokens
from lmeval_ext.models.exllama.memory import PAGE, activation_bytes, gpu_embedding
from lmeval_ext.models.exllama.v3.branches import PageBranches
from lmeval_ext.models.exllama.v3.loading import version


class ExLlamaV3Engine:
    """A loaded model, its cache, and its forward in two parts: body and output matrix. See `Engine`.

    cache: None without one. config: the checkpoint's config.json. embedding_on_gpu: as for `gpu_embedding`.
    """

    def __init__(self, model: Any, cache: Any, config: dict[str, Any], embedding_on_gpu: bool | None = None) -> None:
        self.model, self.cache = model, cache
        self.device = torch.device(model.output_device)
        self.vocabulary = int(model.config.vocab_size)
        self.tensor_parallel = bool(model.loaded_tp)
        self._modules = list(model.fwd_modules)
        self._head = next(m for m in model.modules if m.caps.get("logits_output"))
        self.columns = int(getattr(self._head, "out_features", 0) or self.vocabulary)
        self.token_limit: int | None = None
        self.bytes_per_token = activation_bytes(config) + (2 * self.columns if self.tensor_parallel else 0)
        # ExLlamaV3 keeps embeddings in main memory; uploading float32 states takes 30 % of a small model's time
        self._embedding = (
            None if self.tensor_parallel else gpu_embedding(model.modules[0], model.modules[1].device, embedding_on_gpu)
        )
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        exact = cache is not None and all(type(layer) is CacheLayer_fp16 for layer in cache.layers.values())
        recurrent = bool(model.caps.get("recurrent_states")) or bool(model.get_recurrent_layers())
        self.shares = exact and not recurrent and not self.tensor_parallel and bool(cache.layers)
        self.branches = PageBranches(self, PAGE) if self.shares else None
        self.cache_is_dirty = False  # `branch` has overwritten pages that a generator believes to hold its prompts

    def enter(self) -> None:
        """ExLlamaV3 computes on the stream that is current."""

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The model without its output matrix, with its embeddings on the GPU."""
        first = self.model.modules[0]
        original = getattr(first, "embedding", None), first.device
        self.model.fwd_modules = self._modules[: self._body_length()]
        if self._embedding is not None:
            first.embedding, first.device = self._embedding, self._embedding.weight.device
        try:
            yield
        finally:
            self.model.fwd_modules = self._modules
            if self._embedding is not None:
                first.embedding, first.device = original

    def _body_length(self) -> int:
        if self._modules[-1][0] is not self._head:
            raise UserError(
                f"{type(self.model).__name__}: its output matrix is not its last module; this ExLlamaV3 "
                f"(exllamav3 {version()}) is newer than the adapter, tried with 1.6.5"
            )
        return len(self._modules) - 1

    def body(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Returns hidden states after the last norm, [rows, length, width]. params: as for `Model.forward`."""
        with self._scoring():
            if self._embedding is not None:
                ids = ids.to(self._embedding.weight.device, non_blocking=True)
            return self.model.forward(ids, params)

    def prefill(self, ids: torch.Tensor, params: dict[str, Any]) -> None:
        """Computes keys and values, and nothing after the last layer that has any."""
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
        # The kernels read contiguous rows
        return self._head.forward(self._head.prepare_for_device(hidden.contiguous(), {}), {})

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        return self.branches is not None and self.branches.fits(contexts, tails)

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        assert self.branches is not None
        self.cache_is_dirty = True
        return self.branches.branch(contexts, tails)
