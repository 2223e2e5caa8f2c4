"""What looks at logits while they are there: one observer measures against a store, another fills one.

Adapters hand over each chunk of logits that they compute, with the hidden states they come of and the windows they
belong to; they need not know which of the two is looking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from lmeval_ext.divergence import logits_code
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.measure import TokenDivergence, token_divergence
from lmeval_ext.divergence.store import StoredWindow, Windows

# Float32 logits of the reference that stand in memory at once, unless reference_chunk says otherwise
_CHUNK_BYTES = 128 << 20


class WindowSpan(NamedTuple):
    """Consecutive scored tokens of a window, known by its key: `tokens` of them from number `start` on."""

    window: str
    start: int
    tokens: int


def spans_between(spans: Sequence[WindowSpan], start: int, stop: int) -> list[WindowSpan]:
    """The parts of `spans`, whose tokens stand one after the other, that are tokens `start` to `stop` of all."""
    found, at = [], 0
    for span in spans:
        low, high = max(start, at), min(stop, at + span.tokens)
        if low < high:
            found.append(WindowSpan(span.window, span.start + low - at, high - low))
        at += span.tokens
    return found


class Observer(Protocol):
    """hidden: [tokens, width], or None where the engine shows none. logits: [tokens, ≥ vocabulary]. targets: int64
    [tokens]. spans: which tokens these are, in order."""

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence: ...

    def close(self) -> None:
        """Nothing comes any more."""


def chunk_tokens(vocabulary: int, asked: int | None = None) -> int:
    """Tokens whose reference logits are computed at once: `asked`, or as many as fit into 128 MiB."""
    return asked or max(16, _CHUNK_BYTES // (4 * vocabulary))


class Comparing:
    """Measures a model against the windows of a store.

    vocabulary: the tokens that both have; head: gives the store's output matrix, None in mode "logits".
    """

    def __init__(
        self,
        windows: Mapping[str, StoredWindow],
        head: Callable[[], OutputHead] | None,
        vocabulary: int,
        chunk: int | None = None,
    ) -> None:
        self._windows, self._give_head, self.vocabulary = windows, head, vocabulary
        self._head: OutputHead | None = None
        self._chunk = chunk_tokens(vocabulary, chunk)

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        device = logits.device
        if self._give_head is not None and (self._head is None or self._head.weight.device != device):
            self._head = self._give_head().to(device)
        stored = [self._states(span, device) for span in spans]
        states = {name: torch.cat([s[name] for s in stored]) for name in stored[0]}

        def reference(part: slice) -> torch.Tensor:
            rows = {name: tensor[part] for name, tensor in states.items()}
            return logits_code.decode(rows) if self._head is None else self._head.logits(rows["hidden"], reuse=True)

        return _in_chunks(reference, logits, targets, self.vocabulary, self._chunk)

    def close(self) -> None:
        if isinstance(self._windows, Windows):
            self._windows.close()

    def _states(self, span: WindowSpan, device: torch.device) -> dict[str, torch.Tensor]:
        rows = slice(span.start, span.start + span.tokens)
        states = {name: t[rows] for name, t in self._windows[span.window].states.items()}
        if device.type == "cuda":  # through pinned memory: copying then does not wait for the work that is queued there
            states = {name: t.pin_memory() for name, t in states.items()}
        return {name: t.to(device, non_blocking=True) for name, t in states.items()}


class Saving:
    """Keeps what a window's distributions can be recovered from, and measures the engine's own logits against that.

    head: the model's output matrix; None: rows of logits are kept instead of hidden states (`logits_code`).
    """

    def __init__(self, head: OutputHead | None, vocabulary: int, chunk: int | None = None) -> None:
        self._head, self.vocabulary = head, vocabulary
        self._chunk = chunk_tokens(vocabulary, chunk)
        self._kept: dict[str, list[tuple[int, dict[str, torch.Tensor]]]] = {}

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        parts: list[dict[str, torch.Tensor]] = []
        if self._head is not None and self._head.weight.device != logits.device:
            self._head = self._head.to(logits.device)

        def reference(part: slice) -> torch.Tensor:
            if self._head is None:
                rows = logits_code.encode(logits[part, : self.vocabulary])
                parts.append({name: t.cpu() for name, t in rows.items()})
                return logits_code.decode(rows)
            if hidden is None:
                raise ValueError("no hidden states were handed over")
            parts.append({"hidden": hidden[part].cpu()})
            return self._head.logits(hidden[part], reuse=True)

        found = _in_chunks(reference, logits, targets, self.vocabulary, self._chunk)
        states = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        row = 0
        for span in spans:
            rows = {name: t[row : row + span.tokens].clone() for name, t in states.items()}
            self._kept.setdefault(span.window, []).append((span.start, rows))
            row += span.tokens
        return found

    def close(self) -> None:
        pass

    def has(self, windows: Iterable[str]) -> bool:
        """Whether something of each was kept."""
        return all(window in self._kept for window in windows)

    def take(self, window: str, tokens: int) -> dict[str, torch.Tensor]:
        """A window's states, and forget them. Of a part that came twice (preemption), the last counts."""
        pieces = self._kept.pop(window, [])
        first = next(iter(pieces), (0, {}))[1]
        whole = {name: torch.empty((tokens, *t.shape[1:]), dtype=t.dtype) for name, t in first.items()}
        came = torch.zeros(tokens, dtype=torch.bool)
        for start, rows in pieces:
            for name, t in rows.items():
                whole[name][start : start + t.shape[0]] = t
                came[start : start + t.shape[0]] = True
        if not bool(came.all()):
            raise RuntimeError(f"states of {int((~came).sum())} of {tokens} tokens never came")
        return whole


def _in_chunks(
    reference: Callable[[slice], torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    chunk: int,
) -> TokenDivergence:
    parts = [
        token_divergence(reference(part), logits[part], targets[part], vocabulary)
        for part in (slice(start, start + chunk) for start in range(0, logits.shape[0], chunk))
    ]
    return TokenDivergence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
