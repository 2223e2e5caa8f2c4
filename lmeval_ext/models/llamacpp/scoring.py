"""Log-probabilities of tokens through llama.cpp's batch calls, which compute logits at the scored positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.binding import llama_cpp
from lmeval_ext.models.llamacpp.contexts import Contexts
from lmeval_ext.requests import WindowRequest, key_of

if TYPE_CHECKING:
    from lmeval_ext.divergence.observer import Observer


def whole_cache(llama: Any) -> bool:
    """Whether the cache holds every position from 0 on, so that a prefix of it can be used again.

    The cache of a sliding window (with swa_full=off) overwrites positions that left the window, and a recurrent state
    stands for the last position alone; dropping later positions does not bring them back.
    """
    return int(llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(llama.ctx), 0)) == 0


class LogitObserver:
    """Shows the logits of one window to an observer, part by part."""

    def __init__(self, observer: Observer, window: WindowRequest) -> None:
        self._observer, self._key = observer, key_of(window)
        self._done, self._parts = 0, list[dict[str, np.ndarray]]()

    def observe(self, logits: np.ndarray, targets: list[int]) -> None:
        """Takes the logits of the next scored tokens, float32 [tokens, vocabulary]; they are not kept."""
        import torch

        from lmeval_ext.divergence.measure import fetched
        from lmeval_ext.divergence.observer import WindowSpan

        span = WindowSpan(self._key, self._done, len(targets))
        part = self._observer.observe([span], None, torch.from_numpy(logits), torch.tensor(targets))
        self._parts.append(fetched(part))
        self._done += len(targets)

    def divergence(self) -> dict[str, np.ndarray]:
        """The `TokenDivergence` of all observed tokens, as arrays [tokens]."""
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}


class ContextScorer:
    """Scores token ids in llama.cpp contexts, and reuses the keys and values that they hold.

    llama: `llama_cpp.Llama`. contexts: its contexts. max_length: the most tokens of a sequence. vocabulary: columns of
    its logits.
    """

    def __init__(self, llama: Any, contexts: Contexts, max_length: int, vocabulary: int) -> None:
        self._llama, self._contexts = llama, contexts
        self._max_length, self._vocabulary = max_length, vocabulary
        self._cached: list[int] = []  # tokens whose keys and values are in the cache, from position 0

    def forget(self) -> None:
        """Drops the cached tokens; to be called after the context was used for something else."""
        self._cached = []

    def choices(self, requests: Sequence[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Scores triples (key, context ids, continuation ids); see `TokenLM.score_choices`.

        They are scored in the order of their tokens, so that choices of one question follow each other and share its
        cached context. Choices that need another context are scored after all others.
        """

        def order(index: int) -> tuple[bool, list[int]]:
            _, context, continuation = requests[index]
            ids = context + continuation
            return self._contexts.is_long(len(ids[-(self._max_length + 1) :]) - 1), ids

        for index in sorted(range(len(requests)), key=order):
            _, context, continuation = requests[index]
            ids = (context + continuation)[-(self._max_length + 1) :]
            n = len(continuation)
            logprobs, greedy = self.score(ids[:-n], ids[-n:], reuse=True)
            yield index, (float(logprobs.sum(dtype=np.float64)), bool(greedy.all()))

    def score(
        self, context: list[int], targets: list[int], reuse: bool, observer: LogitObserver | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (logprobs float32, greedy bool) of `targets` given `context`, each of shape [len(targets)].

        reuse: keep the cached tokens that the last call shares with this one. Raises UserError if llama.cpp runs out of
        memory or cache.
        """
        # The last token predicts nothing. It is still fed in a window, as llama-perplexity does: rounding depends on
        # the number of rows in a batch, and with K-quants the last scores would differ from llama-perplexity's.
        fed = context + targets
        if self._contexts.select(len(fed) - 1):  # the last token is only predicted
            self.forget()
        if reuse or len(fed) > self._contexts.selected_size:
            del fed[-1]
        first, last = len(context) - 1, len(context) + len(targets) - 2  # positions whose logits are read
        start = self._rewind(fed, first) if reuse else self._rewind([], 0)
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        logprobs = np.empty(len(targets), dtype=np.float32)
        greedy = np.empty(len(targets), dtype=bool)
        size = llama_cpp.llama_n_batch(self._llama.ctx)
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        try:
            for begin in range(start, len(fed), size):
                part = fed[begin : begin + size]
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i] = token, begin + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = first <= begin + i <= last
                code = llama_cpp.llama_decode(self._llama.ctx, batch)
                if code != 0:
                    llama_cpp.llama_memory_clear(memory, True)
                    self.forget()
                    raise UserError(
                        f"llama_decode returned {code} at token {begin} of {len(fed)}: out of memory or cache; lower "
                        "n_batch or eval_len, or raise n_ctx"
                    )
                scored = range(max(begin, first), min(begin + len(part), last + 1))
                if len(scored):
                    rows = slice(scored[0] - first, scored[-1] + 1 - first)
                    logprobs[rows], greedy[rows] = self._read_logits(len(scored), targets[rows], observer)
        finally:
            llama_cpp.llama_batch_free(batch)
        self._cached = fed
        return logprobs, greedy

    def _rewind(self, fed: list[int], first: int) -> int:
        """Drops cached tokens that differ from `fed`, or from position `first` on; returns how many stay."""
        keep = 0
        while keep < min(len(self._cached), len(fed), first) and self._cached[keep] == fed[keep]:
            keep += 1
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        # Recurrent models refuse to drop a part, so their cache is cleared
        if keep == 0 or not whole_cache(self._llama) or not llama_cpp.llama_memory_seq_rm(memory, 0, keep, -1):
            llama_cpp.llama_memory_clear(memory, True)
            keep = 0
        return keep

    def _read_logits(
        self, rows: int, targets: list[int], observer: LogitObserver | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-softmax in float32 of the last decode's logits at `targets`, and whether each is the argmax.

        rows: positions with logits. observer: receives the logits.
        """
        pointer = llama_cpp.llama_get_logits(self._llama.ctx)
        logits = np.ctypeslib.as_array(pointer, shape=(rows, self._vocabulary))
        top = logits.max(axis=1, keepdims=True)
        normalizer = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
        picked = logits[np.arange(rows), targets]
        if observer is not None:
            observer.observe(logits, targets)
        return (picked - normalizer).astype(np.float32), logits.argmax(axis=1) == np.array(targets)
