"""The fused kernel of `token_divergence` on a GPU. It reads each row once, as an online softmax does (Milakov and
Gimelshein, arXiv:1805.02867)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns per step: the fastest of the sizes tried on an H100 (2.5 of its 3.3 TB/s)
_BLOCK = 4096
_LOW = tl.constexpr(-1e30)  # below any logit, and finite, so that differences are not NaN


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    reference, reference_stride, logits, logits_stride, targets, kld, agree, of_p, of_q, confidence, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    reference += row * reference_stride
    logits += row * logits_stride
    columns = tl.arange(0, BLOCK)
    top_p = tl.full((), _LOW, tl.float32)
    top_q = tl.full((), _LOW, tl.float32)
    first_p = tl.full((), 0, tl.int32)
    first_q = tl.full((), 0, tl.int32)
    # A sum per lane keeps rounding errors small. All are relative to the largest logits so far, and rescaled with them
    total = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    moved = tl.zeros((BLOCK,), tl.float32)
    # The reference's largest logit among tokens of model logit −∞: only at the end is known whether e^ of it is 0
    ruled_out = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        inside = at < vocabulary
        p = tl.load(reference + at, mask=inside, other=float("-inf"))
        q = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        best_p, where_p = tl.max(p, axis=0, return_indices=True)
        best_q, where_q = tl.max(q, axis=0, return_indices=True)
        first_p = tl.where(best_p > top_p, start + where_p, first_p)
        first_q = tl.where(best_q > top_q, start + where_q, first_q)
        grown_p = tl.maximum(best_p - top_p, 0.0)
        grown_q = tl.maximum(best_q - top_q, 0.0)
        top_p = tl.maximum(top_p, best_p)
        top_q = tl.maximum(top_q, best_q)
        left_p = tl.exp(-grown_p)
        left_q = tl.exp(-grown_q)
        a = p - top_p
        b = q - top_q
        weight = tl.exp(a)
        gone = q == float("-inf")
        ruled_out = tl.where(gone, tl.maximum(ruled_out, p), ruled_out)
        moved = (moved + total * (grown_q - grown_p)) * left_p + tl.where((weight == 0) | gone, 0.0, weight * (a - b))
        total = total * left_p + weight
        other = other * left_q + tl.exp(b)
    sum_p = tl.sum(total, axis=0)
    sum_q = tl.sum(other, axis=0)
    target = tl.load(targets + row)
    picked_p = tl.load(reference + target) - top_p
    picked_q = tl.load(logits + target).to(tl.float32) - top_q
    divergence = tl.sum(moved, axis=0) / sum_p + tl.log(sum_q / sum_p)
    infinite = (tl.exp(tl.max(ruled_out, axis=0) - top_p) > 0) & (divergence == divergence)  # NaN stays NaN
    tl.store(kld + row, tl.where(infinite, float("inf"), divergence))
    tl.store(agree + row, first_p == first_q)
    tl.store(of_p + row, picked_p - tl.log(sum_p))
    tl.store(of_q + row, picked_q - tl.log(sum_q))
    tl.store(confidence + row, 1 / sum_p)


def token_divergence_triton(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, ...]:
    """The fields of `TokenDivergence` for CUDA tensors; arguments as for `measure.token_divergence`."""
    reference = reference.float()  # before the strides are read, since a copy has others
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
