"""The fused kernel behind `token_divergence` on a GPU: a row is read twice, the second time from cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    reference, reference_stride, logits, logits_stride, targets, kld, agree, of_p, of_q, confidence, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    reference += row * reference_stride
    logits += row * logits_stride
    columns = tl.arange(0, BLOCK)
    # Pass 1: each lane's largest logits and where they first stood
    best_p = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_q = tl.full((BLOCK,), float("-inf"), tl.float32)
    where_p = tl.full((BLOCK,), 0, tl.int32)
    where_q = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        p = tl.load(reference + at, mask=at < vocabulary, other=float("-inf"))
        q = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        where_p = tl.where(p > best_p, at, where_p)
        where_q = tl.where(q > best_q, at, where_q)
        best_p = tl.maximum(best_p, p)
        best_q = tl.maximum(best_q, q)
    top_p = tl.max(best_p, axis=0)
    top_q = tl.max(best_q, axis=0)
    first_p = tl.min(tl.where(best_p == top_p, where_p, vocabulary), axis=0)
    first_q = tl.min(tl.where(best_q == top_q, where_q, vocabulary), axis=0)
    # Pass 2: the rows are in the cache now; sums by lane keep rounding errors small
    total = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    moved = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        inside = at < vocabulary
        a = tl.load(reference + at, mask=inside, other=float("-inf")) - top_p
        b = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32) - top_q
        weight = tl.exp(a)
        total += weight
        other += tl.exp(b)
        moved += tl.where(weight == 0, 0.0, weight * (a - b))
    sum_p = tl.sum(total, axis=0)
    sum_q = tl.sum(other, axis=0)
    target = tl.load(targets + row)
    picked_p = tl.load(reference + target) - top_p
    picked_q = tl.load(logits + target).to(tl.float32) - top_q
    tl.store(kld + row, tl.sum(moved, axis=0) / sum_p + tl.log(sum_q / sum_p))
    tl.store(agree + row, first_p == first_q)
    tl.store(of_p + row, picked_p - tl.log(sum_p))
    tl.store(of_q + row, picked_q - tl.log(sum_q))
    tl.store(confidence + row, 1 / sum_p)


def token_divergence_triton(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, ...]:
    """The fields of `TokenDivergence`, for CUDA tensors."""
    reference = reference.float()  # before its strides are taken: a copy has others
    reference = reference if reference.stride(1) == 1 else reference.contiguous()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    count = logits.shape[0]
    kld, of_p, of_q, confidence = (reference.new_empty(count, dtype=torch.float32) for _ in range(4))
    agree = reference.new_empty(count, dtype=torch.bool)
    with torch.cuda.device_of(logits):
        _row[(count,)](
            reference, reference.stride(0), logits, logits.stride(0), targets.contiguous(), kld, agree, of_p, of_q,
            confidence, vocabulary, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return kld, agree, of_p, of_q, confidence
