"""Several continuations of one context in ExLlamaV3's paged cache: full pages are shared, the last one is copied.

A *trunk* (the tokens that all contexts of a batch begin with) is computed once and kept for the next batch. Contexts
with several tails are computed on top of it, and their tails on top of them. Contexts with one tail continue from the
trunk in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmeval_ext.models.exllama.engine import Tokens
from lmeval_ext.models.exllama.memory import BLOCK
from lmeval_ext.models.shared_contexts import common_prefix
from lmeval_ext.storage.rounding import ceil_div, round_up

# Lengths are padded to BLOCK also because ExLlamaV3 takes its prefill kernels, not decode graphs, beyond 16 tokens.
_FORWARD_TOKENS = 16384
_PREFILL_TOKENS = 2048  # of the trunk, in one forward
_MIN_TRUNK = 16  # a shorter trunk does not pay for a forward of its own


@dataclass
class PagedSequence:
    """pages: indices of the pages with its tokens, in order, and with room for more. length: tokens computed so far."""

    pages: list[int]
    length: int


class PageBranches:
    """`Engine.branch` on a cache of plain float16 pages.

    engine: offers `cache`, `body` and `prefill`, as `ExLlamaV3Engine` does. page: tokens per page.
    """

    def __init__(self, engine: Any, page: int) -> None:
        self._engine, self._page = engine, page
        self._total_pages = int(engine.cache.max_num_tokens) // page
        self._trunk_tokens: list[int] = []  # in pages 0, 1, …

    def forget(self) -> None:
        """Drops the trunk; to be called after the cache was used for something else."""
        self._trunk_tokens = []

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        """Whether the pages suffice."""
        return BranchLayout(contexts, tails, self._page).pages <= self._total_pages

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """See `Engine.branch`."""
        layout = BranchLayout(contexts, tails, self._page)
        trunk = self._grow_trunk(layout.trunk)
        self._next_page = ceil_div(len(layout.trunk), self._page)  # the first one that is free
        # Contexts that have several tails, on the trunk
        parents = self._fork([trunk] * len(layout.several), layout.context_room)
        rests = [list(contexts[i][len(layout.trunk) :]) for i in layout.several]
        self._feed(parents, rests, keep=False)
        # Tails: on their contexts; or on the trunk, after the rest of the context, if it has only one
        leaf_parents, leaf_tokens = [], []
        for parent, i in zip(parents, layout.several, strict=True):
            leaf_parents += [parent] * len(tails[i])
            leaf_tokens += [list(tail) for tail in tails[i]]
        several_states = self._feed(self._fork(leaf_parents, layout.tail_room), leaf_tokens, keep=True)
        single_tokens = [[*contexts[i][len(layout.trunk) :], *tails[i][0]] for i in layout.single]
        singles = self._fork([trunk] * len(single_tokens), layout.single_room)
        single_states = self._feed(singles, single_tokens, keep=True)
        pieces: dict[int, list[torch.Tensor]] = {}
        states = iter(several_states)
        for i in layout.several:
            pieces[i] = [next(states) for _ in tails[i]]
        for i, state in zip(layout.single, single_states, strict=True):
            pieces[i] = [state[-len(tails[i][0]) :]]
        return torch.cat([piece for i in range(len(contexts)) for piece in pieces[i]])

    # ------------------------------------------------------------------ pages

    def _grow_trunk(self, tokens: list[int]) -> PagedSequence:
        """Computes the trunk; the part that it shares with the last one is not computed again."""
        kept = common_prefix(self._trunk_tokens, tokens)
        self._trunk_tokens = self._trunk_tokens[:kept]
        room = round_up(len(tokens), BLOCK) + BLOCK
        trunk = PagedSequence(list(range(ceil_div(room, self._page))), kept)
        for start in range(kept, len(tokens), _PREFILL_TOKENS):
            self._feed([trunk], [tokens[start : min(start + _PREFILL_TOKENS, len(tokens))]], keep=False)
        self._trunk_tokens = list(tokens)
        return trunk

    def _fork(self, parents: list[PagedSequence], room: int) -> list[PagedSequence]:
        """Returns a copy of each parent with room for more tokens: full pages are shared, the last one is copied."""
        children, sources, copies = [], [], []
        for parent in parents:
            full = parent.length // self._page
            count = ceil_div(parent.length + room, self._page) - full
            own = list(range(self._next_page, self._next_page + count))
            self._next_page += count
            if parent.length % self._page and own:
                sources.append(parent.pages[full])
                copies.append(own[0])
            children.append(PagedSequence(parent.pages[:full] + own, parent.length))
        if copies:
            self._copy_pages(sources, copies)
        return children

    def _copy_pages(self, sources: list[int], targets: list[int]) -> None:
        indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._engine.cache.layers.values():
            for tensor in layer.get_tensors():
                device = tensor.device
                if device not in indices:
                    indices[device] = torch.tensor(sources).to(device), torch.tensor(targets).to(device)
                source, target = indices[device]
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    # ------------------------------------------------------------------ forwards

    def _feed(self, sequences: list[PagedSequence], tokens: list[list[int]], keep: bool) -> list[torch.Tensor]:
        """Appends tokens to each sequence; with `keep`, returns their hidden states, [tokens, width] each."""
        states: list[torch.Tensor] = []
        order = [i for i, t in enumerate(tokens) if t]
        if not order:
            return states
        length = round_up(max(len(tokens[i]) for i in order), BLOCK)
        step = max(1, _FORWARD_TOKENS // length)
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            states += self._forward([sequences[i] for i in rows], [tokens[i] for i in rows], length, keep)
        for sequence, fed in zip(sequences, tokens, strict=True):
            sequence.length += len(fed)
        return states

    def _forward(
        self, sequences: list[PagedSequence], tokens: list[list[int]], length: int, keep: bool
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
        if not keep:
            self._engine.prefill(ids, params)
            return []
        hidden = self._engine.body(ids, params)
        return [hidden[i, : len(fed)] for i, fed in enumerate(tokens)]


class BranchLayout:
    """Which tokens of a batch are fed in which step, and how many pages that takes.

    trunk: the tokens that all contexts begin with. several, single: indices of the contexts with several tails and with
    one. context_room, tail_room, single_room: tokens that a row of each step takes.
    """

    def __init__(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]], page: int) -> None:
        shared = min((common_prefix(contexts[0], c) for c in contexts), default=0)
        trunk = shared if shared >= _MIN_TRUNK else 0
        self.trunk = list(contexts[0][:trunk])
        self.several = [i for i, t in enumerate(tails) if len(t) > 1]
        self.single = [i for i, t in enumerate(tails) if len(t) == 1]
        rest = [len(c) - trunk for c in contexts]
        # Rows are padded to the longest of their forward, and padding is written to the cache, too
        self.context_room = round_up(max((rest[i] for i in self.several), default=0), BLOCK)
        self.tail_room = round_up(max((len(t) for i in self.several for t in tails[i]), default=0), BLOCK)
        self.single_room = round_up(max((rest[i] + len(tails[i][0]) for i in self.single), default=0), BLOCK)

        def extra(length: int, room: int) -> int:
            return ceil_div(length + room, page) - length // page

        pages = ceil_div(trunk, page)
        pages += len(self.several) * extra(trunk, self.context_room)
        pages += sum(len(tails[i]) * extra(len(contexts[i]), self.tail_room) for i in self.several)
        pages += len(self.single) * extra(trunk, self.single_room)
        # Growing the trunk pads, too, before the others need their pages
        self.pages = max(pages, ceil_div(trunk + 2 * BLOCK, page))
