"""Log-probabilities of known tokens from logits, on the device of the logits and without a float32 copy of them.

On a GPU one fused kernel reads each row of logits twice, the second time from cache; on other devices PyTorch
processes the rows in small blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

# Float32 elements of one block of rows on a CPU: 4 MiB, about a core's share of the cache.
_BLOCK_ELEMENTS = 1 << 20


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits)[target] in float32, and whether the target is the first choice.

    logits: [positions, ≥ vocabulary] of any float type; columns beyond `vocabulary` are an engine's padding and are
    ignored. targets: int64 [positions], below `vocabulary`, on the same device. Returns (logprobs float32, greedy
    bool), both [positions], on that device, without synchronizing with it. Of equal logits the lowest id is the first
    choice, as in `torch.argmax` on a CPU. A NaN among the logits makes its row's log-probability NaN.

    log p(t) = (x_t − max x) − ln Σ exp(x − max x), all in float32.
    """
    if logits.shape[0] == 0:
        return logits.new_empty(0, dtype=torch.float32), logits.new_empty(0, dtype=torch.bool)
    if logits.is_cuda and (kernel := _fused()) is not None:
        scores: tuple[torch.Tensor, torch.Tensor] = kernel(logits, targets, vocabulary)
        return scores
    return _blockwise(logits, targets, vocabulary)


def _blockwise(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    greedy = logits.new_empty(logits.shape[0], dtype=torch.bool)
    step = max(1, _BLOCK_ELEMENTS // vocabulary)
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        rows, ids = logits[block, :vocabulary].float(), targets[block]
        picked = rows.gather(1, ids[:, None])[:, 0]
        logprobs[block] = picked - torch.logsumexp(rows, dim=1)
        greedy[block] = rows.argmax(dim=1) == ids
    return logprobs, greedy


@functools.cache
def _fused() -> Any:
    """The Triton kernel; None if Triton is not installed."""
    try:
        from lmeval_ext.models.target_logprobs_triton import target_logprobs_triton
    except ImportError:
        return None
    return target_logprobs_triton


def logprobs_of_targets(logits: Any, targets: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """`target_logprobs` as numpy arrays: (logprobs float32, greedy bool), both [positions]."""
    logprobs, greedy = target_logprobs(logits, targets.to(logits.device), vocabulary)
    return logprobs.cpu().numpy(), greedy.cpu().numpy()
