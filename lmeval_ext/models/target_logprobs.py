"""Log-probabilities of known tokens from logits, where the logits are: no float32 copy of them, nothing fetched.

On a GPU one fused kernel reads each row of logits twice, the second time from cache; elsewhere PyTorch works through
the rows in blocks that stay small.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

# Float32 elements of one block of rows off the GPU: 4 MiB, about a core's share of the cache.
_BLOCK_ELEMENTS = 1 << 20


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits)[target] in float32, and whether the target is the first choice.

    logits: [positions, ≥ vocabulary] of any float type; columns beyond `vocabulary` are an engine's padding and take
    no part. targets: int64 [positions], below `vocabulary`, on the same device. Returns (logprobs float32, greedy
    bool), both [positions], on that device, without waiting for it. Of equal logits the lowest id is the first choice,
    as in `torch.argmax` on a CPU. A NaN among the logits makes its row's log-probability NaN.

    log p(t) = (x_t − max x) − ln Σ exp(x − max x), all in float32.
    """
    if logits.shape[0] == 0:
        return logits.new_empty(0, dtype=torch.float32), logits.new_empty(0, dtype=torch.bool)
    if logits.is_cuda and (kernel := _fused()) is not None:
        answer: tuple[torch.Tensor, torch.Tensor] = kernel(logits, targets, vocabulary)
        return answer
    return _blockwise(logits, targets, vocabulary)


def _blockwise(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    greedy = logits.new_empty(logits.shape[0], dtype=torch.bool)
    step = max(1, _BLOCK_ELEMENTS // vocabulary)
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        rows, wanted = logits[block, :vocabulary].float(), targets[block]
        picked = rows.gather(1, wanted[:, None])[:, 0]
        logprobs[block] = picked - torch.logsumexp(rows, dim=1)
        greedy[block] = rows.argmax(dim=1) == wanted
    return logprobs, greedy


@functools.cache
def _fused() -> Any:
    """The Triton kernel, or None where there is no Triton."""
    try:
        from lmeval_ext.models.target_logprobs_triton import target_logprobs_triton
    except ImportError:
        return None
    return target_logprobs_triton


def logprobs_of_targets(logits: Any, targets: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """`target_logprobs`, fetched: (logprobs float32, greedy bool), both [positions]."""
    from lmeval_ext.models.target_logprobs import target_logprobs

    logprobs, greedy = target_logprobs(logits, targets.to(logits.device), vocabulary)
    return logprobs.cpu().numpy(), greedy.cpu().numpy()
