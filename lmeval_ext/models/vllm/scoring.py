"""Scores of prompt tokens, computed inside vLLM's workers from the hidden states of each step.

A request asks for scores in `SamplingParams.extra_args`. After each step the runner (runners.py) passes that step's
hidden states, and which of their rows predict a token to score. The output matrix runs on those rows alone, in chunks,
and only a float32 log-probability and a bool per token are kept, on the device, until `take` returns them. So results
do not depend on how vLLM cuts prompts into steps, nor on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.divergence.observer import Observer, WindowSpan, spans_between
from lmeval_ext.errors import UserError
from lmeval_ext.models.target_logprobs import target_logprobs

# Key in SamplingParams.extra_args. Its value is [number of the request, position of its first scored token], and the
# window's key if it is observed.
EXTRA_ARG = "lmeval_ext_score"

# Bytes of logits at one time. On a GPU a product this large is efficient; a CPU is faster within its caches.
_LOGITS_BYTES = 256 << 20
_LOGITS_BYTES_ON_CPU = 16 << 20


@dataclass(frozen=True)
class Span:
    """Consecutive scored tokens of one request: `count` of them from position `start` of its prompt.

    window: which of a window's scored tokens these are, if the window is observed.
    """

    request: int
    start: int
    count: int
    window: WindowSpan | None = None


@dataclass
class Step:
    """The scored tokens of one engine step, and which row of its hidden states predicts each.

    rows: int64 [tokens]. targets: int64 [tokens], on the model's device.
    """

    spans: list[Span]
    rows: np.ndarray
    targets: torch.Tensor


@dataclass
class PromptScorer:
    """Collects scores over steps.

    compute_logits: hidden states [rows, hidden] to logits [rows, ≥ vocabulary], or to None on the ranks of a
    vocabulary-sharded head that do not gather them; called by all ranks in the same order. observer: receives the
    logits of windows. head_input: gives the last input of the output matrix, which is not always the final hidden
    states. refused: message of the observer's UserError, which `take` returns; raised here it would end the engine.
    """

    compute_logits: Callable[[torch.Tensor], torch.Tensor | None]
    vocabulary: int
    observer: Observer | None = None
    head_input: Callable[[], torch.Tensor | None] = lambda: None
    refused: str | None = None
    _spans: list[Span] = field(default_factory=list)
    _divergences: list[TokenDivergence] = field(default_factory=list)
    _logprobs: list[torch.Tensor] = field(default_factory=list)
    _greedy: list[torch.Tensor] = field(default_factory=list)

    def add(self, hidden_states: torch.Tensor, step: Step) -> None:
        """Scores one step completely or not at all, so that an error in the middle cannot shift later scores.

        hidden_states: [≥ rows, hidden], after the final norm.
        """
        rows = to_device(torch.from_numpy(step.rows), hidden_states.device)
        chunk = self.chunk_rows(hidden_states)
        windows = [span.window for span in step.spans if span.window is not None]
        observed = self.observer is not None and len(windows) == len(step.spans)
        parts = [
            self._score(
                hidden_states.index_select(0, rows[start : start + chunk]),
                step.targets[start : start + chunk],
                spans_between(windows, start, start + chunk) if observed else None,
            )
            for start in range(0, len(rows), chunk)
        ]
        chunks = [part for part in parts if part is not None]
        if chunks:
            self._spans += step.spans
            self._logprobs += [logprobs for logprobs, _, _ in chunks]
            self._greedy += [greedy for _, greedy, _ in chunks]
            self._divergences += [divergence for *_, divergence in chunks if divergence is not None]

    def _score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, windows: list[WindowSpan] | None
    ) -> tuple[torch.Tensor, torch.Tensor, TokenDivergence | None] | None:
        """(logprobs, greedy, divergence) of rows whose logits exist at one time; None on a rank without logits."""
        logits = self.compute_logits(hidden_states)
        if logits is None:
            return None
        scores = target_logprobs(logits, targets, min(self.vocabulary, logits.shape[-1]))
        if windows is None or self.observer is None:
            return (*scores, None)
        try:
            return (*scores, self.observer.observe(windows, self.head_input(), logits, targets))
        except UserError as error:
            self.stop_observing()
            self.refused = str(error)
            return (*scores, None)

    def stop_observing(self) -> None:
        """Releases the observer, and discards its message."""
        if self.observer is not None:
            self.observer.close()
        self.observer = self.refused = None

    def chunk_rows(self, hidden_states: torch.Tensor) -> int:
        """Number of rows whose logits fit into the bytes of one chunk; the same on every rank."""
        budget = _LOGITS_BYTES_ON_CPU if hidden_states.device.type == "cpu" else _LOGITS_BYTES
        return max(16, budget // (self.vocabulary * hidden_states.element_size()))

    def take(self) -> dict[str, Any] | None:
        """Returns all scores so far and discards them; plain types, for vLLM's message encoder.

        spans: [[request, start, count], …]. logprobs: float32 bytes, greedy: bool bytes, both of all spans in order;
        likewise the fields of `TokenDivergence`, if all spans were observed. None on a rank without logits.
        {"refused": message} alone, if the observer raised a UserError.
        """
        refused, self.refused = self.refused, None
        spans, logprobs, greedy, divergences = self._spans, self._logprobs, self._greedy, self._divergences
        self._spans, self._logprobs, self._greedy, self._divergences = [], [], [], []
        if refused is not None:
            return {"refused": refused}
        if not logprobs:
            return None
        columns = {"logprobs": logprobs, "greedy": greedy}
        if len(divergences) == len(logprobs):
            columns |= {name: [getattr(d, name) for d in divergences] for name in TokenDivergence._fields}
        return {
            "spans": [[s.request, s.start, s.count] for s in spans],
            **{name: torch.cat(parts).cpu().numpy().tobytes() for name, parts in columns.items()},
        }


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to the device without waiting for the work that is queued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def scored_span(extra_args: dict[str, Any] | None, first: int, count: int, prompt: int) -> Span | None:
    """The scored tokens that the states of positions `first` … `first + count − 1` of a prompt predict.

    The state of position p predicts token p + 1. prompt: its number of tokens. None if there are no scored tokens.
    """
    if not extra_args or EXTRA_ARG not in extra_args:
        return None
    number, first_scored, *key = extra_args[EXTRA_ARG]
    start = max(first + 1, first_scored)
    stop = min(first + count + 1, prompt)
    if start >= stop:
        return None
    return Span(number, start, stop - start, WindowSpan(key[0], start - first_scored, stop - start) if key else None)
