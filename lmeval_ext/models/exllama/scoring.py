"""Log-probabilities of windows and of choices on an `Engine`: in batches, with shared contexts, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.divergence.observer import Observer, WindowSpan, spans_between
from lmeval_ext.models.exllama.batching import Batching, HostCopy
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.memory import BLOCK, is_out_of_memory, release_memory
from lmeval_ext.models.shared_contexts import Group, shared_batches, split_groups
from lmeval_ext.models.target_logprobs import target_logprobs
from lmeval_ext.requests import WindowRequest, WindowScores, key_of, same_shape
from lmeval_ext.storage.rounding import round_up

ChoiceScore = tuple[float, bool]  # sum of log-probabilities, whether every target is the most likely token


class EngineScorer:
    """Scores token ids on an engine. Tensors stay on the engine's device until a group of batches is done."""

    def __init__(self, engine: Engine, batching: Batching) -> None:
        self.engine, self.batching = engine, batching

    # ------------------------------------------------------------------ windows

    @torch.inference_mode()
    def windows(
        self, windows: Sequence[WindowRequest], done: Callable[[int], Any], observer: Observer | None = None
    ) -> list[WindowScores]:
        """Returns the scores of each window, in order. Windows of one shape share batches, without padding.

        done: receives how many more windows are done. observer: receives the logits of every scored token, and the
        hidden states that they come from.
        """
        self.engine.enter()
        results: list[WindowScores | None] = [None] * len(windows)
        for indices in same_shape(windows):
            ids = _pinned(torch.tensor([windows[i].ids for i in indices], dtype=torch.int64), self.engine.device)
            count = len(windows[indices[0]].target_ids)
            targets = ids[:, -count:].to(self.engine.device, non_blocking=True)
            rows = None if observer is None else _ObservedRows(observer, [_span(windows[i]) for i in indices])

            def forward(
                start: int, stop: int, ids: Any = ids, targets: Any = targets, count: int = count, rows: Any = rows
            ) -> Any:
                # The last token is fed, too: it costs little, and kernels are fastest on whole blocks
                hidden = self.engine.hidden(ids[start:stop], count + 1)[:, :-1]
                observed = None if rows is None else rows.part(start, stop)
                return self._score(hidden.reshape(-1, hidden.shape[-1]), targets[start:stop].reshape(-1), observed)

            def receive(
                start: int, stop: int, arrays: list[np.ndarray], indices: Any = indices, count: int = count
            ) -> None:
                # While the GPU computes: a third of a small model's time goes into the figures of the result file
                logprobs, greedy, *figures = (a.reshape(stop - start, count) for a in arrays)
                for row, i in enumerate(indices[start:stop]):
                    divergence = (
                        {name: a[row] for name, a in zip(TokenDivergence._fields, figures, strict=True)}
                        if figures
                        else None
                    )
                    results[i] = WindowScores.of(logprobs[row], greedy[row], divergence)
                done(stop - start)

            self.batching.run(len(indices), ids.shape[1], forward, receive)
        return [r for r in results if r is not None]

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, observed: _ObservedRows | None = None) -> Any:
        """Scores one target per row of hidden states: (log-probability float32, whether it is the most likely token).

        With `observed`, the fields of `TokenDivergence` follow.
        """
        step = self.batching.logit_rows()
        parts = []
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits = self.engine.logits(hidden[rows])
            scores = target_logprobs(logits, targets[rows], self.engine.vocabulary)
            figures = () if observed is None else observed.observe(rows, hidden[rows], logits, targets[rows])
            parts.append((*scores, *figures))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    # ------------------------------------------------------------------ choices

    @torch.inference_mode()
    def choices(self, groups: Sequence[Group]) -> Iterator[tuple[int, ChoiceScore]]:
        """Yields (request, its score) as batches finish, in any order."""
        self.engine.enter()
        shared, plain = split_groups(groups) if self.engine.shares else ([], list(groups))
        pending: _PendingScores | None = None
        for scores in self._launch(shared, plain):
            if pending is not None:
                yield from pending.scores()
            pending = scores
        if pending is not None:
            yield from pending.scores()

    def _launch(self, shared: list[Group], plain: list[Group]) -> Iterator[_PendingScores]:
        budget = self.batching.tokens
        for batch in shared_batches(shared, budget, self.engine.fits):
            if batch.fits:
                yield from self._shared(batch.groups, plain)
            else:
                plain += batch.groups
        yield from self._plain(plain)

    def _shared(self, groups: list[Group], plain: list[Group]) -> Iterator[_PendingScores]:
        """Scores groups on top of their contexts; if memory runs out, half of them at a time.

        A single group that does not fit is added to `plain`, whose contexts are not shared.
        """
        try:
            # Hidden states get no name here: it would keep them in memory while a smaller batch is tried
            pending = self._pick(self.engine.branch([g.context for g in groups], [g.tails for g in groups]), groups)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            pending = None
        if pending is not None:
            yield pending
            return
        release_memory()
        half = len(groups) // 2
        if half == 0:
            plain += groups
            return
        yield from self._shared(groups[:half], plain)
        yield from self._shared(groups[half:], plain)

    def _pick(self, hidden: torch.Tensor, groups: Sequence[Group]) -> _PendingScores:
        """Scores targets from the hidden states of all tails of `groups`, which follow each other in `hidden`."""
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
        return _PendingScores(logprobs, greedy, spans)

    def _plain(self, groups: Sequence[Group]) -> Iterator[_PendingScores]:
        """Scores every sequence from its first token on, in padded batches, the longest first."""
        rows = [
            Group((), [(*group.context, *tail)], [wanted])
            for group in groups
            for tail, wanted in zip(group.tails, group.wanted, strict=True)
        ]
        rows.sort(key=lambda row: (-len(row.tails[0]), row.tails[0]))
        start = 0
        while start < len(rows):
            length = len(rows[start].tails[0])
            padded = round_up(length, BLOCK)
            limit = self.engine.token_limit
            if limit is not None and padded > limit:
                padded = length
            stop = min(start + self.batching.rows(padded), len(rows))
            try:
                pending = self._padded(rows[start:stop], padded)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                pending = None
            if pending is None:
                release_memory()
                self.batching.shrink(stop - start, padded)
                continue
            yield pending
            start = stop

    def _padded(self, rows: Sequence[Group], length: int) -> _PendingScores:
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


class _ObservedRows:
    """An observer, and the windows that rows of hidden states belong to; windows have the same number of targets."""

    def __init__(self, observer: Observer, spans: Sequence[WindowSpan]) -> None:
        self._observer, self._spans = observer, list(spans)

    def part(self, start: int, stop: int) -> _ObservedRows:
        """The windows [start, stop)."""
        return _ObservedRows(self._observer, self._spans[start:stop])

    def observe(
        self, rows: slice, hidden: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        """Shows rows to the observer. rows: their place among all rows of these windows."""
        spans = spans_between(self._spans, rows.start, rows.start + len(targets))
        return self._observer.observe(spans, hidden, logits, targets)


def _span(window: WindowRequest) -> WindowSpan:
    return WindowSpan(key_of(window), 0, len(window.target_ids))


class _PendingScores:
    """Scores of choices that the GPU may still be computing. spans: (request, its number of targets), in order."""

    def __init__(self, logprobs: torch.Tensor, greedy: torch.Tensor, spans: list[tuple[int, int]]) -> None:
        self._copy, self._spans = HostCopy((logprobs, greedy)), spans

    def scores(self) -> Iterator[tuple[int, ChoiceScore]]:
        """Waits for the scores; yields (request, its score)."""
        logprobs, greedy = self._copy.arrays()
        position = 0
        for request, count in self._spans:
            part = slice(position, position + count)
            yield request, (float(logprobs[part].sum(dtype=np.float64)), bool(greedy[part].all()))
            position += count


def _pinned(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    return ids.pin_memory() if device.type == "cuda" else ids
