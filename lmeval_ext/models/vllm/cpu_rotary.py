"""Rotary embeddings of queries [tokens, heads, dim] on a CPU, of which vLLM's kernel rotates one head alone.

`ops.rotary_embedding` (vLLM 0.32) takes the number of heads from the size of the last dimension. That is right for
queries [tokens, heads · dim]; multi-head latent attention (DeepSeek, Kimi, GLM-5) passes three dimensions, and its
perplexities were 12 % off. Such queries go through vLLM's own PyTorch code instead. Results are written in place, as
the kernel does, because some callers use only that.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

_MARK = "_lmeval_ext"


def register() -> None:
    """Replaces `RotaryEmbedding.forward_cpu`. Idempotent; does nothing in a vLLM without such a method."""
    try:
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    except ImportError as error:  # another version of vLLM, which has to start nevertheless
        logger.warning("rotary embeddings of this vLLM are unknown (%s)", error)
        return
    kernel = vars(RotaryEmbedding).get("forward_cpu")
    if kernel is not None and not hasattr(kernel, _MARK):
        RotaryEmbedding.forward_cpu = _by_dimensions(kernel)


def is_right() -> bool:
    """Whether queries of three dimensions are rotated as vLLM's PyTorch code does it: computed, not believed."""
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        with set_current_vllm_config(VllmConfig()):
            rotary = RotaryEmbedding(64, 64, 8, 10000.0, False, torch.float32)
        positions, query, key = torch.arange(4), torch.ones(4, 3, 64), torch.ones(4, 1, 64)
        expected = rotary.forward_native(positions, query.clone(), key.clone())
        rotated = rotary.forward_cpu(positions, query.clone(), key.clone())
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rotated, expected, strict=True))
    except Exception as error:
        logger.warning("rotary embeddings of this vLLM could not be checked: %s", error)
        return False


def _by_dimensions(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None, *others: Any, **named: Any) -> Any:
        if query.dim() < 3 and (key is None or key.dim() < 3):
            return kernel(self, positions, query, key, *others, **named)
        rotated = self.forward_native(positions, query, key, *others, **named)
        for target, source in zip((query, key), rotated, strict=True):
            if target is not None:
                target.copy_(source.reshape(target.shape))
        return query, key

    setattr(forward_cpu, _MARK, True)
    return forward_cpu
