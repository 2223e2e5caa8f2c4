"""D_KL and its company for rows of logits, where the logits are: nothing of a vocabulary's size is fetched."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

# Float32 elements of one block of rows off the GPU: 4 MiB, about a core's share of the cache
_BLOCK_ELEMENTS = 1 << 20


class TokenDivergence(NamedTuple):
    """One value a scored token, all on the logits' device.

    kld: float32, D_KL(reference ‖ model) in nats. agree: bool, both have the same first choice. reference_logprobs:
    float32, ln p of the true token under the reference. confidence: float32, the reference's largest probability.
    """

    kld: torch.Tensor
    agree: torch.Tensor
    reference_logprobs: torch.Tensor
    confidence: torch.Tensor


def fetched(found: TokenDivergence) -> dict[str, np.ndarray]:
    """As `WindowScores.of` takes it."""
    return {name: tensor.cpu().numpy() for name, tensor in found._asdict().items()}


def token_divergence(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> TokenDivergence:
    """Divergence of `logits` from `reference`, row by row, over the first `vocabulary` columns of both.

    reference: float32 [tokens, ≥ vocabulary], logits up to a constant a row. logits: [tokens, ≥ vocabulary] of any
    float type, on the same device. targets: int64 [tokens], below `vocabulary`.

    With a and b the logits less their largest, A = Σ eᵃ, B = Σ eᵇ:  D_KL = Σ eᵃ (a − b) / A + ln (B / A), in float32.
    Rounding leaves an error of about 1e-7, of either sign, where both are equal; it is not clipped. A token that the
    reference gives no probability (in float32) adds nothing; one that the model alone rules out makes it infinite; a
    NaN on either side makes it NaN. Of equal logits the lowest id is the first choice.
    """
    if logits.is_cuda and logits.shape[0] and (kernel := _fused()) is not None:
        return TokenDivergence(*kernel(reference, logits, targets, vocabulary))
    return _blockwise(reference, logits, targets, vocabulary)


def _blockwise(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> TokenDivergence:
    count = logits.shape[0]
    kld, logprobs, confidence = (reference.new_empty(count, dtype=torch.float32) for _ in range(3))
    agree = reference.new_empty(count, dtype=torch.bool)
    step = max(1, _BLOCK_ELEMENTS // vocabulary)
    for start in range(0, count, step):
        block = slice(start, start + step)
        p, q = reference[block, :vocabulary].float(), logits[block, :vocabulary].float()
        top_p, top_q = p.max(dim=1, keepdim=True), q.max(dim=1, keepdim=True)
        picked = p.gather(1, targets[block, None])[:, 0] - top_p.values[:, 0]
        agree[block] = (top_p.indices == top_q.indices)[:, 0]
        a, b = p - top_p.values, q - top_q.values
        weights = a.exp()
        total, other = weights.sum(1), b.exp().sum(1)
        # Not 0 × ∞ where the reference rules a token out
        moved = torch.where(weights == 0, 0.0, weights * (a - b)).sum(1)
        kld[block] = moved / total + (other / total).log()
        logprobs[block] = picked - total.log()
        confidence[block] = 1 / total
    return TokenDivergence(kld, agree, logprobs, confidence)


@functools.cache
def _fused() -> Any:
    """The Triton kernel, or None where there is no Triton."""
    try:
        from lmeval_ext.divergence.measure_triton import token_divergence_triton
    except ImportError:
        return None
    return token_divergence_triton
