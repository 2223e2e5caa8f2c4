"""Observes logits while they exist: one observer measures against a store, another fills one.

Adapters hand over each chunk of logits that they compute, with the hidden states they come from and the windows they
belong to; they need not know which of the two observers receives it.
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

# Float32 logits of the reference that are in memory at once, unless reference_chunk is given
_CHUNK_BYTES = 128 << 20


class WindowSpan(NamedTuple):
    """Consecutive scored tokens of a window: `tokens` of them, from index `start` on. window: its key."""

    window: str
    start: int
    tokens: int


def spans_between(spans: Sequence[WindowSpan], start: int, stop: int) -> list[WindowSpan]:
    """The parts of `spans` that cover tokens `start` to `stop` of their concatenation."""
    parts, offset = [], 0
    for span in spans:
        low, high = max(start, offset), min(stop, offset + span.tokens)
        if low < high:
            parts.append(WindowSpan(span.window, span.start + low - offset, high - low))
        offset += span.tokens
    return parts


def chunk_tokens(vocabulary: int, chunk: int | None = None) -> int:
    """Number of tokens whose reference logits are computed at once: `chunk`, or as many as fit into 128 MiB."""
    return chunk or max(16, _CHUNK_BYTES // (4 * vocabulary))


class Observer(Protocol):
    """Receives logits while windows are scored."""

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        """Observe the tokens of one chunk; returns their divergence from the reference.

        spans: which tokens these are, in order. hidden: [tokens, width], or None if the engine gives none. logits:
        [tokens, ≥ vocabulary]. targets: int64 [tokens].
        """

    def close(self) -> None:
        """Releases resources."""


class Comparing:
    """Measures a model against the windows of a store.

    vocabulary: size of the vocabulary that both have. head: returns the store's output matrix; None in mode "logits".
    chunk: as for `chunk_tokens`. upload: the one that has already copied the matrix to a GPU, if any.
    """

    def __init__(
        self,
        windows: Mapping[str, StoredWindow],
        head: Callable[[], OutputHead] | None,
        vocabulary: int,
        chunk: int | None = None,
        upload: Upload | None = None,
    ) -> None:
        self._windows, self._load_head, self.vocabulary = windows, head, vocabulary
        self._head: OutputHead | None = None
        self._chunk = chunk_tokens(vocabulary, chunk)
        self._upload = upload

    def observe(
        self, spans: Sequence[WindowSpan], hidden: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor
    ) -> TokenDivergence:
        upload = self._upload_to(logits.device)
        if self._load_head is not None and (self._head is None or self._head.weight.device != logits.device):
            self._head = upload.head(self._load_head())
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


class Saving:
    """Keeps what recovers a window's distributions, and measures the engine's own logits against that.

    head: the model's output matrix; None: coded rows of logits are kept instead of hidden states (`logits_code`).
    vocabulary: columns of the softmax. chunk: as for `chunk_tokens`.
    """

    def __init__(self, head: OutputHead | None, vocabulary: int, chunk: int | None = None) -> None:
        self._head, self.vocabulary = head, vocabulary
        self._chunk = chunk_tokens(vocabulary, chunk)
        self._states: dict[str, list[tuple[int, dict[str, torch.Tensor]]]] = {}

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

        divergence = _in_chunks(reference, logits, targets, self.vocabulary, self._chunk)
        states = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        row = 0
        for span in spans:
            rows = {name: t[row : row + span.tokens].clone() for name, t in states.items()}
            self._states.setdefault(span.window, []).append((span.start, rows))
            row += span.tokens
        return divergence

    def close(self) -> None:
        pass

    def has(self, windows: Iterable[str]) -> bool:
        """Whether states of each of these windows were kept."""
        return all(window in self._states for window in windows)

    def take(self, window: str, tokens: int) -> dict[str, torch.Tensor]:
        """Return a window's states by name, [tokens, …], and forget them.

        If a part was observed twice (preemption), the last states count. Raises RuntimeError if a part is missing.
        """
        pieces = self._states.pop(window, [])
        first = next(iter(pieces), (0, {}))[1]
        states = {name: torch.empty((tokens, *t.shape[1:]), dtype=t.dtype) for name, t in first.items()}
        present = torch.zeros(tokens, dtype=torch.bool)
        for start, rows in pieces:
            for name, t in rows.items():
                states[name][start : start + t.shape[0]] = t
                present[start : start + t.shape[0]] = True
        if not bool(present.all()):
            raise RuntimeError(f"window {window}: states of {int((~present).sum())} of {tokens} tokens are missing")
        return states


class Upload:
    """Copies from main memory to a device, in parallel with the work that is queued there.

    On the GPU's current stream, a copy of memory that is not pinned waits for all of that work; on a separate stream
    it takes as long as pinning alone would.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # including its index
        self._stream = _stream(self.device) if device.type == "cuda" else None

    def rows(self, parts: Iterable[Mapping[str, torch.Tensor]], total: int) -> dict[str, torch.Tensor]:
        """Concatenate the rows of all parts by name, [total, …] on the device. Holds one part at a time.

        parts: tensors [rows, …] by name, `total` rows in all.
        """
        joined: dict[str, torch.Tensor] = {}
        start = 0
        with self._on_stream():
            for part in parts:
                stop = start + len(next(iter(part.values())))
                for name, rows in part.items():
                    if name not in joined:
                        joined[name] = rows.new_empty((total, *rows.shape[1:]), device=self.device)
                    joined[name][start:stop].copy_(rows)
                start = stop
        self._hand_over(joined.values())
        return joined

    def copied(self, head: OutputHead) -> OutputHead:
        """A copy on the device, also on a CPU: a stored head is the memory of a mapped file.

        Pass it to `head` before use: only that makes the current stream wait for the copy.
        """
        with self._on_stream():
            return head.to(self.device)

    def head(self, head: OutputHead) -> OutputHead:
        """The head for use on the current stream; copied unless `copied` has copied it to this GPU already."""
        copy = head if head.weight.is_cuda and head.weight.device == self.device else self.copied(head)
        self._hand_over(copy.tensors().values())
        return copy

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # Set the device too: leaving the stream alone would open a context on the thread's default device, GPU 0
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def _hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the current stream wait for the copies, and keep their memory until its work with them is done."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: PyTorch does not share free memory between streams."""
    return torch.cuda.Stream(device)


def _in_chunks(
    reference: Callable[[slice], torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    chunk: int,
) -> TokenDivergence:
    """Divergence from `reference`, which returns the reference's logits of the rows in a slice, chunk by chunk."""
    parts = [
        token_divergence(reference(part), logits[part], targets[part], vocabulary)
        for part in (slice(start, start + chunk) for start in range(0, logits.shape[0], chunk))
    ]
    return TokenDivergence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
