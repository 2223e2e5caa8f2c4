"""What looks at logits while they are there: one observer measures against a store, another fills one.

Adapters hand over each chunk of logits that they compute, with the hidden states they come of and the windows they
belong to; they need not know which of the two is looking.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from lmeval_ext.divergence import logits_code
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.measure import TokenDivergence, token_divergence
from lmeval_ext.divergence.read_ahead import Windows
from lmeval_ext.divergence.store import StoredWindow

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

    vocabulary: the tokens that both have; head: gives the store's output matrix, None in mode "logits". upload: what
    has brought the matrix to a GPU already.
    """

    def __init__(
        self,
        windows: Mapping[str, StoredWindow],
        head: Callable[[], OutputHead] | None,
        vocabulary: int,
        chunk: int | None = None,
        upload: Upload | None = None,
    ) -> None:
        self._windows, self._give_head, self.vocabulary = windows, head, vocabulary
        self._head: OutputHead | None = None
        self._chunk = chunk_tokens(vocabulary, chunk)
        self._upload = upload

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        upload = self._upload_to(logits.device)
        if self._give_head is not None and (self._head is None or self._head.weight.device != logits.device):
            self._head = upload.head(self._give_head())
        states = upload.rows(map(self._stored, spans), sum(span.tokens for span in spans))

        def reference(part: slice) -> torch.Tensor:
            rows = {name: tensor[part] for name, tensor in states.items()}
            return logits_code.decode(rows) if self._head is None else self._head.logits(rows["hidden"], reuse=True)

        return _in_chunks(reference, logits, targets, self.vocabulary, self._chunk)

    def close(self) -> None:
        if isinstance(self._windows, Windows):
            self._windows.close()

    def _stored(self, span: WindowSpan) -> dict[str, torch.Tensor]:
        rows = slice(span.start, span.start + span.tokens)
        return {name: tensor[rows] for name, tensor in self._windows[span.window].states.items()}

    def _upload_to(self, device: torch.device) -> Upload:
        if self._upload is None or self._upload.device != device:
            self._upload = Upload(device)
        return self._upload


class Upload:
    """From main memory to a device, beside the work that is queued there.

    On the GPU's current stream, a copy of memory that is not pinned waits for all of that work; on a stream of its own
    it takes as long as pinning alone would.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        self._stream = _stream(self.device) if device.type == "cuda" else None

    def rows(self, parts: Iterable[Mapping[str, torch.Tensor]], total: int) -> dict[str, torch.Tensor]:
        """The parts' rows one after the other, `total` in all, by name. Of the parts, one at a time is looked at."""
        found: dict[str, torch.Tensor] = {}
        at = 0
        with self._beside():
            for part in parts:
                stop = at + len(next(iter(part.values())))
                for name, rows in part.items():
                    if name not in found:
                        found[name] = rows.new_empty((total, *rows.shape[1:]), device=self.device)
                    found[name][at:stop].copy_(rows)
                at = stop
        self._hand_over(found.values())
        return found

    def copied(self, head: OutputHead) -> OutputHead:
        """A copy there, on a CPU too: a stored head is a file's memory. `head` hands it over."""
        with self._beside():
            return head.to(self.device)

    def head(self, head: OutputHead) -> OutputHead:
        """The head for the current stream, copied unless `copied` has done that on this GPU."""
        there = head if head.weight.is_cuda and head.weight.device == self.device else self.copied(head)
        self._hand_over(there.tensors().values())
        return there

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # The device first: leaving the stream alone would open a context on the thread's own, the first GPU
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def _hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """To the current stream: it waits for them, and their memory, which is the other stream's, for it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: PyTorch keeps the memory of each stream apart, also when it is free."""
    return torch.cuda.Stream(device)


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
