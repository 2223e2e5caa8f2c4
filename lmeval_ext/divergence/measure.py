"""Measures D_KL and related values per token on the device of the logits, so that nothing as large as the vocabulary is
copied from it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

# Float32 elements of one block of rows on a CPU: 4 MiB, about a core's share of the cache
_BLOCK_ELEMENTS = 1 << 20


class TokenDivergence(NamedTuple):
    """One value per scored token, each a tensor [tokens] on the logits' device.

    kld: float32, D_KL(reference ‖ model) in nats. agree: bool, whether both have the same first choice.
    reference_logprobs: float32, ln p of the true token under the reference. model_logprobs: float32, under the model,
    over the tokens that both have. confidence: float32, the reference's largest probability.
    """

    kld: torch.Tensor
    agree: torch.Tensor
    reference_logprobs: torch.Tensor
    model_logprobs: torch.Tensor
    confidence: torch.Tensor


def token_divergence(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> TokenDivergence:
    """Divergence of `logits` from `reference`, row by row, over the first `vocabulary` columns of both.

    reference: float32 [tokens, ≥ vocabulary], logits up to a constant per row. logits: [tokens, ≥ vocabulary] of any
    float type, on the same device. targets: int64 [tokens], below `vocabulary`.

    With a and b the logits minus their largest, A = Σ eᵃ, B = Σ eᵇ:  D_KL = Σ eᵃ (a − b) / A + ln (B / A), in float32.
    If both are equal, rounding leaves an error of about 1e-7 of either sign, which is not clipped. A token to which the
    reference gives zero probability (in float32) adds nothing; one to which the model alone gives zero makes D_KL
    infinite; a NaN on either side makes it NaN. Of equal logits the one with the lowest id is the first choice.
    """
    if logits.is_cuda and logits.shape[0] and (kernel := _fused()) is not None:
        return TokenDivergence(*kernel(reference, logits, targets, vocabulary))
    return _blockwise(reference, logits, targets, vocabulary)


def fetched(divergence: TokenDivergence) -> dict[str, np.ndarray]:
    """The values in main memory by name, as `WindowScores.of` takes them."""
    return {name: tensor.cpu().numpy() for name, tensor in divergence._asdict().items()}


def _blockwise(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> TokenDivergence:
    count = logits.shape[0]
    kld, of_p, of_q, confidence = (reference.new_empty(count, dtype=torch.float32) for _ in range(4))
    agree = reference.new_empty(count, dtype=torch.bool)
    step = min(max(1, _BLOCK_ELEMENTS // vocabulary), max(1, count))
    # Reuse memory: fresh pages cost as much time as the arithmetic
    as_float, below_p, below_q, weights = (reference.new_empty(step, vocabulary, dtype=torch.float32) for _ in range(4))
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        rows = block.stop - start
        p, q = reference[block, :vocabulary].float(), as_float[:rows].copy_(logits[block, :vocabulary])
        first_p, first_q = _first_choices(p), _first_choices(q)
        a = torch.sub(p, p.gather(1, first_p), out=below_p[:rows])
        b = torch.sub(q, q.gather(1, first_q), out=below_q[:rows])
        of_p[block], of_q[block] = (x.gather(1, targets[block, None])[:, 0] for x in (a, b))
        w = torch.exp(a, out=weights[:rows])
        total, moved = w.sum(1), w.mul_(a.sub_(b)).sum(1)
        other = b.exp_().sum(1)
        kld[block] = moved / total + (other / total).log()
        nonfinite = ~kld[block].isfinite()
        if bool(nonfinite.any()):
            kld[block][nonfinite] = _with_infinities(p[nonfinite], q[nonfinite])
        agree[block] = (first_p == first_q)[:, 0]
        of_p[block] -= total.log()
        of_q[block] -= other.log()
        confidence[block] = 1 / total
    return TokenDivergence(kld, agree, of_p, of_q, confidence)


def _first_choices(rows: torch.Tensor) -> torch.Tensor:
    """The lowest id with the largest value, int64 [tokens, 1]."""
    if rows.device.type != "cpu":
        return rows.argmax(1, keepdim=True)
    return torch.from_numpy(rows.numpy().argmax(1))[:, None]  # eight times as fast as PyTorch's


def _with_infinities(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D_KL of rows with logits of −∞: a token to which the reference gives zero adds 0 instead of 0 × ∞."""
    a, b = p.log_softmax(1), q.log_softmax(1)
    weights = a.exp()
    return torch.where(weights == 0, 0.0, weights * (a - b)).sum(1)


@functools.cache
def _fused() -> Any:
    """The Triton kernel, or None without Triton."""
    try:
        from lmeval_ext.divergence.measure_triton import token_divergence_triton
    except ImportError:
        return None
    return token_divergence_triton
