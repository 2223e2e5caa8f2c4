"""A loaded ExLlamaV2 model as an `Engine`."""

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

from lmeval_ext.models.exllama.engine import Tokens
from lmeval_ext.models.exllama.memory import activation_bytes, gpu_embedding
from lmeval_ext.models.exllama.v2.branches import RowBranches


class ExLlamaV2Engine:
    """A loaded model and its forward in two parts: body and output matrix. See `Engine`.

    config: the checkpoint's config.json. embedding_on_gpu: as for `gpu_embedding`.
    """

    def __init__(self, model: Any, config: dict[str, Any], embedding_on_gpu: bool | None = None) -> None:
        self.model = model
        self._modules = list(model.modules)
        self._head_index = int(model.head_layer_idx)
        head = self._modules[self._head_index]
        self.device = torch.device(head.device())
        self.vocabulary = int(model.config.vocab_size)
        self.columns = int(head.out_features)
        self.token_limit: int | None = int(model.config.max_input_len * model.config.max_batch_size)
        self.bytes_per_token = activation_bytes(config)
        self.shares = True
        self._softcap = model.config.final_logit_softcapping
        self._embedding = gpu_embedding(self._modules[0], self._modules[1].device(), embedding_on_gpu)
        self.embedding_bytes = 0 if self._embedding is None else self._embedding.weight.nbytes
        self.branches = RowBranches(self, self._new_cache, self.token_limit, int(model.config.max_seq_len))

    def enter(self) -> None:
        """ExLlamaV2 has a stream of its own on every GPU."""
        set_device_streams()
        torch.cuda.set_device(self.device)

    @contextmanager
    def _gpu_embedding(self) -> Iterator[None]:
        """The model with its embeddings on the GPU."""
        first = self._modules[0]
        original = first.embedding
        if self._embedding is not None:
            first.embedding = self._embedding
        try:
            yield
        finally:
            first.embedding = original

    def body(self, ids: torch.Tensor, cache: Any = None, past: int = 0) -> torch.Tensor:
        """Returns hidden states after the last norm, [rows, length, width]. past: tokens in the cache before `ids`."""
        return self._forward(self._head_index, ids, cache, past)

    def prefill(self, ids: torch.Tensor, cache: Any, past: int) -> None:
        """Computes keys and values, and nothing after the last layer that has any."""
        self._forward(self.model.last_kv_layer_idx + 1, ids, cache, past)

    def _forward(self, modules: int, ids: torch.Tensor, cache: Any, past: int) -> torch.Tensor:
        """Runs the first `modules` modules, as `ExLlamaV2.forward_chunk` does."""
        set_device_streams()
        params = v2_attention.ExLlamaV2Attention.Params(ids.shape[0], ids.shape[1], past, None, None)
        x = ids if self._embedding is None else ids.to(self._embedding.weight.device, non_blocking=True)
        with self._gpu_embedding():
            for module in self._modules[:modules]:
                if module.device_idx is not None and module.device_idx >= 0:
                    x = safe_move_tensor(x, module.device_idx, non_blocking=True)
                x = module.forward(x, cache=cache, attn_params=params, past_len=past, loras=None)
        torch.cuda.set_stream(self.model.get_device_context(x.device.index).stream)
        return x

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return self.body(ids)[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._modules[self._head_index].forward(hidden.contiguous())
        if self._softcap:
            exllamav2_ext.softcap_(logits, self._softcap)
        return logits

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        return self.branches.fits(contexts, tails)

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        return self.branches.branch(contexts, tails)

    def _new_cache(self, rows: int, length: int) -> Any:
        return ExLlamaV2Cache(self.model, batch_size=rows, max_seq_len=length)
