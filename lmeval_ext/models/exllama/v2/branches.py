"""Several continuations of one context in ExLlamaV2: the context in one cache, copied to the rows of another.

A context is computed in the *trunk*, a cache of one row, where its tokens are kept for the next call. Each tail is then
computed in its own row of the *leaves*, into which the trunk's keys and values are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmeval_ext.models.exllama.engine import Tokens
from lmeval_ext.models.exllama.memory import BLOCK, PAGE
from lmeval_ext.models.exllama.v2.loading import cache_bytes
from lmeval_ext.models.shared_contexts import common_prefix
from lmeval_ext.storage.rounding import round_up

_MIN_ROWS = 4  # of the leaves: few questions have fewer choices


class RowBranches:
    """`Engine.branch` on caches of float16 rows.

    engine: offers `body` and `prefill`, as `ExLlamaV2Engine` does. new_cache: makes an `ExLlamaV2Cache` of so many rows
    and tokens per row. token_limit: tokens of one forward. max_length: the longest sequence.
    """

    def __init__(self, engine: Any, new_cache: Callable[[int, int], Any], token_limit: int, max_length: int) -> None:
        self._engine, self._new_cache = engine, new_cache
        self._token_limit, self._max_length = token_limit, max_length
        self._trunk: Any = None
        self._leaves: Any = None
        self._trunk_tokens: list[int] = []

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        """Whether one forward and the caches suffice."""
        limit = self._token_limit
        lengths = [_padded_length(rows) for rows in tails]
        longest = max(len(c) + length for c, length in zip(contexts, lengths, strict=True))
        fed = max(len(rows) * length for rows, length in zip(tails, lengths, strict=True))
        room = max(map(len, tails)) * longest  # keys and values of all rows, side by side
        return longest <= min(limit, self._max_length) and fed <= limit and room <= 2 * limit

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """See `Engine.branch`."""
        return torch.cat([part for c, rows in zip(contexts, tails, strict=True) for part in self._tails(list(c), rows)])

    @property
    def cache_bytes(self) -> int:
        """Bytes of both caches, which belong neither to the model nor to the generator's KV cache."""
        return cache_bytes(self._trunk) + cache_bytes(self._leaves)

    def _tails(self, context: list[int], tails: Sequence[Tokens]) -> list[torch.Tensor]:
        """Returns the hidden states of each tail. What the trunk holds of the context is not computed again."""
        length = _padded_length(tails)
        self._make_room(len(tails), len(context) + length)
        kept = common_prefix(self._trunk_tokens, context)
        self._trunk_tokens = self._trunk_tokens[:kept]
        if len(context) > kept:
            self._trunk.current_seq_len = kept
            self._engine.prefill(torch.tensor([context[kept:]]), self._trunk, kept)
        self._trunk_tokens = context
        n = len(context)
        if n:
            self._trunk.copy_states(self._leaves, 0, n, 0, n, 0, 1, 0, len(tails))
        self._leaves.current_seq_len = n
        ids = torch.zeros((len(tails), length), dtype=torch.int64)
        for i, tail in enumerate(tails):
            ids[i, : len(tail)] = torch.tensor(list(tail))
        hidden = self._engine.body(ids, self._leaves, n)
        return [hidden[i, : len(tail)] for i, tail in enumerate(tails)]

    def _make_room(self, rows: int, length: int) -> None:
        """Makes caches for `rows` rows of `length` tokens, unless the present ones are large enough.

        The rows of one question are never combined with the length of another, which would take far more memory.
        """
        length = round_up(length, PAGE)
        if self._trunk is None or self._trunk.max_seq_len < length:
            self._trunk, self._trunk_tokens = None, []  # the old cache is freed first
            self._trunk = self._new_cache(1, length)
        if self._leaves is None or self._leaves.batch_size < rows or self._leaves.max_seq_len < length:
            self._leaves = None
            self._leaves = self._new_cache(max(_MIN_ROWS, rows), length)


def _padded_length(tails: Sequence[Tokens]) -> int:
    return round_up(max(map(len, tails)), BLOCK)
