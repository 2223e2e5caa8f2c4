"""`Engine`: the interface of a loaded ExLlama model that scoring works against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Tokens = Sequence[int]


class Engine(Protocol):
    """A loaded model, whose forward has two parts: body and output matrix. All returned tensors are on `device`.

    vocabulary: size of the softmax. columns: logits per position, ≥ vocabulary. token_limit: the most tokens (rows ×
    length) of one forward; None: the engine has no limit. bytes_per_token: memory that a forward needs per token,
    roughly. shares: whether `branch` can be called.
    """

    device: torch.device
    vocabulary: int
    columns: int
    token_limit: int | None
    bytes_per_token: int
    shares: bool

    def enter(self) -> None:
        """Makes the engine's CUDA stream the current one of this thread."""

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Returns the input of `logits` at the last `keep` positions of each row: [rows, keep, width].

        ids: int64 [rows, length] on the CPU.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, columns], of any float type."""
        ...

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        """Whether `branch` can take these at once."""
        ...

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """Computes each context once, and each of its tails on top of it.

        contexts: token ids, possibly none. tails: for each context, one or more lists of at least one token id.
        Returns the hidden states of the tails' positions, in order: [sum of the tails' lengths, width].
        """
        ...
