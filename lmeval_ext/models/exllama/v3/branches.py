"""Several continuations on one context in ExLlamaV3's paged cache: full pages are shared, the last one is copied.

A trunk (what the contexts of a batch have in common) is computed once and kept for the next batch. On it stand the
contexts with several tails; on those their tails. Contexts with one tail go on from the trunk in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmeval_ext.models.shared_contexts import common_prefix

_BLOCK = 32  # lengths are padded to blocks: beyond 16 tokens ExLlamaV3 takes its prefill kernels, not decode graphs
_ROWS = 16384  # tokens of one forward
_WORTHWHILE = 16  # a shorter trunk is not worth a forward of its own

Tokens = Sequence[int]


@dataclass
class _Sequence:
    """pages: of its tokens, in order, with room for what comes next. length: tokens that stand in them."""

    pages: list[int]
    length: int


class Branches:
    """`Engine.branch` on a cache of plain float16 pages."""

    def __init__(self, engine: Any, page: int) -> None:
        self._engine, self._page = engine, page
        self._total = int(engine.cache.max_num_tokens) // page
        self._trunk: list[int] = []  # its tokens; they stand in pages 0, 1, …

    def forget(self) -> None:
        """Somebody else used the cache."""
        self._trunk = []

    def fit(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        """Whether the pages suffice."""
        return _Plan(contexts, tails, self._page).pages <= self._total

    def run(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """See `Engine.branch`."""
        plan = _Plan(contexts, tails, self._page)
        trunk = self._grow(plan.trunk)
        self._next = self._pages(len(plan.trunk))  # the first page that is free to work in
        # Contexts that have several tails, on the trunk
        parents = self._fork([trunk] * len(plan.several), plan.context_room)
        rests = [list(contexts[i][len(plan.trunk) :]) for i in plan.several]
        self._feed(parents, rests, want=False)
        # Tails: on their contexts, or, where there is one only, on the trunk with the rest of the context before it
        leaves, fed = [], []
        for parent, i in zip(parents, plan.several, strict=True):
            leaves += [parent] * len(tails[i])
            fed += [list(tail) for tail in tails[i]]
        of_several = self._feed(self._fork(leaves, plan.tail_room), fed, want=True)
        whole = [[*contexts[i][len(plan.trunk) :], *tails[i][0]] for i in plan.single]
        of_single = self._feed(self._fork([trunk] * len(whole), plan.single_room), whole, want=True)
        pieces: dict[int, list[torch.Tensor]] = {}
        at = iter(of_several)
        for i in plan.several:
            pieces[i] = [next(at) for _ in tails[i]]
        for i, states in zip(plan.single, of_single, strict=True):
            pieces[i] = [states[-len(tails[i][0]) :]]
        return torch.cat([piece for i in range(len(contexts)) for piece in pieces[i]])

    # ------------------------------------------------------------------ pages

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _grow(self, tokens: list[int]) -> _Sequence:
        """The trunk: what it shares with the last one stays, the rest is computed."""
        kept = common_prefix(self._trunk, tokens)
        self._trunk = self._trunk[:kept]
        room = -(-len(tokens) // _BLOCK) * _BLOCK + _BLOCK
        trunk = _Sequence(list(range(self._pages(room))), kept)
        for start in range(kept, len(tokens), 2048):
            self._feed([trunk], [tokens[start : min(start + 2048, len(tokens))]], want=False)
        self._trunk = list(tokens)
        return trunk

    def _fork(self, parents: list[_Sequence], room: int) -> list[_Sequence]:
        """A copy of each parent with `room` tokens more: its full pages themselves, its last one copied."""
        children, sources, copies = [], [], []
        for parent in parents:
            full = parent.length // self._page
            own = list(range(self._next, self._next + self._pages(parent.length + room) - full))
            self._next += len(own)
            if parent.length % self._page and own:
                sources.append(parent.pages[full])
                copies.append(own[0])
            children.append(_Sequence(parent.pages[:full] + own, parent.length))
        if copies:
            self._copy(sources, copies)
        return children

    def _copy(self, sources: list[int], copies: list[int]) -> None:
        indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._engine.cache.layers.values():
            for tensor in layer.get_tensors():
                if tensor.device not in indices:
                    here = tensor.device
                    indices[here] = torch.tensor(sources).to(here), torch.tensor(copies).to(here)
                source, target = indices[tensor.device]
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    # ------------------------------------------------------------------ forwards

    def _feed(self, sequences: list[_Sequence], tokens: list[list[int]], want: bool) -> list[torch.Tensor]:
        """Append tokens to each sequence; with `want` their hidden states, [tokens, width] each."""
        states: list[torch.Tensor] = []
        order = [i for i, t in enumerate(tokens) if t]
        if not order:
            return states
        length = _padded(max(len(tokens[i]) for i in order))
        step = max(1, _ROWS // length)
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            states += self._forward([sequences[i] for i in rows], [tokens[i] for i in rows], length, want)
        for sequence, fed in zip(sequences, tokens, strict=True):
            sequence.length += len(fed)
        return states

    def _forward(
        self, sequences: list[_Sequence], tokens: list[list[int]], length: int, want: bool
    ) -> list[torch.Tensor]:
        ids = torch.zeros((len(tokens), length), dtype=torch.int64)
        width = max(len(s.pages) for s in sequences)
        table = torch.zeros((len(tokens), width), dtype=torch.int32)
        for i, (sequence, fed) in enumerate(zip(sequences, tokens, strict=True)):
            ids[i, : len(fed)] = torch.tensor(fed)
            table[i, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
        params = {
            "attn_mode": "flash_attn",
            "cache": self._engine.cache,
            "block_table": table,
            "cache_seqlens": torch.tensor([s.length for s in sequences], dtype=torch.int32),
        }
        if not want:
            self._engine.prefill(ids, params)
            return []
        hidden = self._engine.body(ids, params)
        return [hidden[i, : len(fed)] for i, fed in enumerate(tokens)]


class _Plan:
    """Which part of a batch is fed where, and how many pages that takes."""

    def __init__(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]], page: int) -> None:
        shared = min((common_prefix(contexts[0], c) for c in contexts), default=0)
        trunk = shared if shared >= _WORTHWHILE else 0
        self.trunk = list(contexts[0][:trunk])
        self.several = [i for i, t in enumerate(tails) if len(t) > 1]
        self.single = [i for i, t in enumerate(tails) if len(t) == 1]
        rest = [len(c) - trunk for c in contexts]
        # Rows are padded to the longest of their forward, and padding is written, too
        self.context_room = _padded(max((rest[i] for i in self.several), default=0))
        self.tail_room = _padded(max((len(t) for i in self.several for t in tails[i]), default=0))
        self.single_room = _padded(max((rest[i] + len(tails[i][0]) for i in self.single), default=0))

        def extra(length: int, room: int) -> int:
            return -(-(length + room) // page) - length // page

        pages = -(-trunk // page)
        pages += len(self.several) * extra(trunk, self.context_room)
        pages += sum(len(tails[i]) * extra(len(contexts[i]), self.tail_room) for i in self.several)
        pages += len(self.single) * extra(trunk, self.single_room)
        # Growing the trunk pads, too, before the others need their pages
        self.pages = max(pages, -(-(trunk + 2 * _BLOCK) // page))


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
