"""`Engine`: what scoring needs of a loaded ExLlama model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Engine(Protocol):
    """A loaded model, in the terms in which it is scored. All tensors that it returns are on `device`.

    vocabulary: what the softmax runs over. columns: logits a position, ≥ vocabulary. token_limit: the most tokens
    (rows × length) of one forward, None for no limit of its own. bytes_per_token: what a forward needs a token,
    roughly. shares: whether `branch` is to be had.
    """

    device: torch.device
    vocabulary: int
    columns: int
    token_limit: int | None
    bytes_per_token: int
    shares: bool

    def enter(self) -> None:
        """Make the engine's CUDA stream the current one of this thread."""

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """What goes into `logits`, of the last `keep` positions of each row.

        ids: int64 [rows, length] on the CPU. Returns [rows, keep, width].
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, columns], of any float type."""
        ...

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        """Whether `branch` can take these at once."""
        ...

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Each context computed once, and each of its tails on top of it.

        contexts: token ids, possibly none. tails: for each context, one or more lists of at least one token id.
        Returns the hidden states of the tails' positions, in order: [sum of the tails' lengths, width].
        """
        ...
