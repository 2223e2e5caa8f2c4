"""Log-probabilities of windows and of choices on an `Engine`: batches, shared contexts, nothing fetched in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.divergence.observer import Observer, WindowSpan, spans_between
from lmeval_ext.models.exllama.batching import Batching, Fetched
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.memory import is_out_of_memory, release_memory
from lmeval_ext.models.shared_contexts import Group, shared_batches, split_groups
from lmeval_ext.models.target_logprobs import target_logprobs
from lmeval_ext.requests import WindowRequest, WindowScores, key_of, same_shape

# Plain batches are padded to whole blocks of tokens: kernels are then compiled and tuned for a few lengths only.
PAD = 32
Answer = tuple[float, bool]


class Scorer:
    """Scores token ids on an engine. Tensors stay on the engine's device until a group of batches is done."""

    def __init__(self, engine: Engine, batching: Batching) -> None:
        self.engine, self.batching = engine, batching

    # ------------------------------------------------------------------ windows

    @torch.inference_mode()
    def windows(
        self, windows: Sequence[WindowRequest], done: Callable[[int], Any], observer: Observer | None = None
    ) -> list[WindowScores]:
        """Scores of each window, in order. Windows of one shape share batches, without padding. done: told how many.

        observer: looks at the logits of every scored token, and at the states that they come of.
        """
        self.engine.enter()
        results: list[WindowScores | None] = [None] * len(windows)
        for indices in same_shape(windows):
            ids = _pinned(torch.tensor([windows[i].ids for i in indices], dtype=torch.int64), self.engine.device)
            kept = len(windows[indices[0]].target_ids)
            targets = ids[:, -kept:].to(self.engine.device, non_blocking=True)

            watch = None if observer is None else _Watch(observer, [_span(windows[i]) for i in indices], kept)

            def forward(
                start: int, stop: int, ids: Any = ids, targets: Any = targets, kept: int = kept, watch: Any = watch
            ) -> Any:
                # The whole window is fed: its last token costs little, and whole blocks are what kernels like
                hidden = self.engine.hidden(ids[start:stop], kept + 1)[:, :-1]
                look = None if watch is None else watch.of_rows(start, stop)
                return self._score(hidden.reshape(-1, hidden.shape[-1]), targets[start:stop].reshape(-1), look)

            def landed(
                start: int, stop: int, arrays: list[np.ndarray], indices: Any = indices, kept: int = kept
            ) -> None:
                # While the GPU computes: a third of a small model's time goes into the figures of the result file
                logprobs, greedy, *more = (a.reshape(stop - start, kept) for a in arrays)
                for row, i in enumerate(indices[start:stop]):
                    found = (
                        {name: a[row] for name, a in zip(TokenDivergence._fields, more, strict=True)} if more else None
                    )
                    results[i] = WindowScores.of(logprobs[row], greedy[row], found)
                done(stop - start)

            self.batching.run(len(indices), ids.shape[1], forward, landed)
        return [r for r in results if r is not None]

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, watch: _Watch | None = None) -> Any:
        """(log-probability float32, whether it is the first choice) of one target a row of hidden states.

        And the fields of `TokenDivergence`, if somebody watches.
        """
        step = self.batching.logit_rows()
        parts = []
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits = self.engine.logits(hidden[rows])
            scores = target_logprobs(logits, targets[rows], self.engine.vocabulary)
            more = () if watch is None else watch.observe(rows, hidden[rows], logits, targets[rows])
            parts.append((*scores, *more))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    # ------------------------------------------------------------------ choices

    @torch.inference_mode()
    def choices(self, groups: Sequence[Group]) -> Iterator[tuple[int, Answer]]:
        """(request, (sum of log-probabilities, all targets are first choices)) as batches finish, in any order."""
        self.engine.enter()
        shared, plain = split_groups(groups) if self.engine.shares else ([], list(groups))
        pending: _Launched | None = None
        for launched in self._launch(shared, plain):
            if pending is not None:
                yield from pending.answers()
            pending = launched
        if pending is not None:
            yield from pending.answers()

    def _launch(self, shared: list[Group], plain: list[Group]) -> Iterator[_Launched]:
        budget = self.batching.tokens
        for batch in shared_batches(shared, budget, self.engine.fits):
            if batch.fits:
                yield from self._shared(batch.groups, plain)
            else:
                plain += batch.groups
        yield from self._plain(plain)

    def _shared(self, groups: list[Group], plain: list[Group]) -> Iterator[_Launched]:
        """One batch of groups on top of their contexts; smaller, and at last without sharing, if memory runs out."""
        try:
            # The states have no name here, which would keep them while a smaller batch looks for room
            launched = self._pick(self.engine.branch([g.context for g in groups], [g.tails for g in groups]), groups)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            launched = None
        if launched is not None:
            yield launched
            return
        release_memory()
        half = len(groups) // 2
        if half == 0:
            plain += groups
            return
        yield from self._shared(groups[:half], plain)
        yield from self._shared(groups[half:], plain)

    def _pick(self, hidden: torch.Tensor, groups: Sequence[Group]) -> _Launched:
        """Scores from the hidden states of all tails of `groups`, one after the other."""
        rows: list[int] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []  # request, number of targets
        position = 0
        for group in groups:
            for tail, wanted in zip(group.tails, group.wanted, strict=True):
                for request, tokens in wanted:
                    rows += range(position + len(tail) - len(tokens), position + len(tail))
                    targets += tokens
                    spans.append((request, len(tokens)))
                position += len(tail)
        device = self.engine.device
        picked = hidden.index_select(0, torch.tensor(rows).to(hidden.device))
        logprobs, greedy = self._score(picked, torch.tensor(targets).to(device))
        return _Launched(logprobs, greedy, spans)

    def _plain(self, groups: Sequence[Group]) -> Iterator[_Launched]:
        """Every sequence from its first token on, in padded batches, the longest first."""
        rows = [
            Group((), [(*group.context, *tail)], [wanted])
            for group in groups
            for tail, wanted in zip(group.tails, group.wanted, strict=True)
        ]
        rows.sort(key=lambda row: (-len(row.tails[0]), row.tails[0]))
        start = 0
        while start < len(rows):
            length = len(rows[start].tails[0])
            padded = -(-length // PAD) * PAD
            limit = self.engine.token_limit
            if limit is not None and padded > limit:
                padded = length
            stop = min(start + self.batching.rows(padded), len(rows))
            try:
                launched = self._padded(rows[start:stop], padded)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                launched = None
            if launched is None:
                release_memory()
                self.batching.shrink(stop - start, padded)
                continue
            yield launched
            start = stop

    def _padded(self, rows: Sequence[Group], length: int) -> _Launched:
        ids = torch.zeros((len(rows), length), dtype=torch.int64)
        tails = [row.tails[0] for row in rows]
        needed = [max(len(tokens) for _, tokens in row.wanted[0]) for row in rows]
        for i, tail in enumerate(tails):
            ids[i, : len(tail)] = torch.tensor(tail)
        # From the first position that predicts a target of any row
        first = min(len(tail) - n for tail, n in zip(tails, needed, strict=True))
        hidden = self.engine.hidden(_pinned(ids, self.engine.device), length - first)
        width = hidden.shape[1]
        index = [
            i * width + len(tail) - n + k - first
            for i, (tail, n) in enumerate(zip(tails, needed, strict=True))
            for k in range(n)
        ]
        flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(index).to(hidden.device))
        shortened = [Group((), [tail[-n:]], row.wanted) for tail, n, row in zip(tails, needed, rows, strict=True)]
        return self._pick(flat, shortened)


class _Watch:
    """An observer, and the windows that it sees: rows of one shape, `kept` scored tokens each."""

    def __init__(self, observer: Observer, spans: Sequence[WindowSpan], kept: int) -> None:
        self._observer, self._spans, self._kept = observer, list(spans), kept

    def of_rows(self, start: int, stop: int) -> _Watch:
        return _Watch(self._observer, self._spans[start:stop], self._kept)

    def observe(
        self, rows: slice, hidden: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        spans = spans_between(self._spans, rows.start, rows.start + len(targets))
        return self._observer.observe(spans, hidden, logits, targets)


def _span(window: WindowRequest) -> WindowSpan:
    return WindowSpan(key_of(window), 0, len(window.target_ids))


class _Launched:
    """Scores that the GPU is still computing."""

    def __init__(self, logprobs: torch.Tensor, greedy: torch.Tensor, spans: list[tuple[int, int]]) -> None:
        self._fetched, self._spans = Fetched((logprobs, greedy)), spans

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Waits for them."""
        logprobs, greedy = self._fetched.arrays()
        at = 0
        for request, count in self._spans:
            part = slice(at, at + count)
            yield request, (float(logprobs[part].sum(dtype=np.float64)), bool(greedy[part].all()))
            at += count


def _pinned(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    return ids.pin_memory() if device.type == "cuda" else ids
