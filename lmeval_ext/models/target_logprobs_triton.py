"""The fused kernel behind `target_logprobs` on a GPU. Tested with Triton 3.6 on an H200."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _row(logits, row_stride, targets, logprobs, greedy, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns = tl.arange(0, BLOCK)
    # Pass 1: each lane's largest logit and its first position
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        where = tl.where(x > best, at, where)
        best = tl.maximum(best, x)
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, where, vocabulary), axis=0)
    # Pass 2, with the row in the cache: sums per lane keep rounding errors small
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        total += tl.exp(x - top)
    target = tl.load(targets + row)
    picked = tl.load(logits + target).to(tl.float32)
    tl.store(logprobs + row, picked - top - tl.log(tl.sum(total, axis=0)))
    tl.store(greedy + row, first == target)


def target_logprobs_triton(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`target_logprobs` for CUDA tensors."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    greedy = torch.empty(logits.shape[0], dtype=torch.bool, device=logits.device)
    with torch.cuda.device(logits.device):
        _row[(logits.shape[0],)](
            logits, logits.stride(0), targets.contiguous(), logprobs, greedy, vocabulary, BLOCK=_BLOCK, num_warps=8
        )
    return logprobs, greedy
