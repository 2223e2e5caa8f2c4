"""Perplexity protocols: pure functions from the length of a token sequence to windows.

A *window* is a slice of the text's tokens that a model sees at once; its last positions are *scored*,
the ones before are context. Published perplexities differ mainly in how they cut windows, so each way
has a name and is one row of `PROTOCOLS`:

========== ======================================== ============================ ===========================
protocol   windows                                  scored targets               used by
========== ======================================== ============================ ===========================
exllama    every `stride` while start < n-eval_len  all but the first token      ExLlamaV3 eval/compare_q.py
llamacpp   disjoint                                 those after the middle + 1   llama.cpp tools/perplexity
gptq       disjoint                                 all but the first token      GPTQ's opt.py, papers since
sliding    every `stride`, ragged at the end        each token of the text once  Transformers' guide [1]_
========== ======================================== ============================ ===========================

.. [1] "Perplexity of fixed-length models" in the Transformers documentation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmeval_ext.errors import UserError
from lmeval_ext.tokens import TokenIds


@dataclass(frozen=True)
class Window:
    """Positions of one window in the text's tokens: [start, end) is seen, [first_target, end) is scored.

    Always start < first_target < end: the first token of a window has no context and is never scored.
    """

    index: int
    start: int
    end: int
    first_target: int

    @property
    def scored(self) -> int:
        """Number of scored targets."""
        return self.end - self.first_target


@dataclass(frozen=True)
class WindowSpec:
    """A protocol with its settings: everything that decides which tokens are seen and scored together.

    eval_len: tokens a window. stride: tokens from one window's start to the next one's. max_rows: the first
    so many windows, 0 for all. warmup_tokens: so many positions of a window more are context only.
    """

    protocol: str
    eval_len: int
    stride: int
    max_rows: int = 0
    warmup_tokens: int = 0

    def __post_init__(self) -> None:
        rule = PROTOCOLS.get(self.protocol)
        if rule is None:
            raise UserError(f"protocol={self.protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        for name, low in (("eval_len", 2), ("stride", 1), ("max_rows", 0), ("warmup_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"{name}={value!r}: expected a whole number of at least {low}")
        if self.protocol == "llamacpp" and self.eval_len < 4:
            raise UserError(f"eval_len={self.eval_len}: protocol 'llamacpp' scores half a window; use at least 4")
        if self.stride > self.eval_len:
            raise UserError(
                f"stride={self.stride} is larger than eval_len={self.eval_len}: tokens between the windows would "
                f"never be seen; use a stride of 1 to {self.eval_len}"
            )
        if rule.disjoint and self.stride != self.eval_len:
            raise UserError(
                f"stride={self.stride}: the windows of protocol {self.protocol!r} are disjoint; leave stride out, "
                "or use the task wiki2_strided for overlapping windows"
            )
        if self.warmup_tokens and not rule.warmup:
            raise UserError(
                f"warmup_tokens={self.warmup_tokens}: protocol {self.protocol!r} fixes its scored positions; "
                "leave warmup_tokens out, or use the task wiki2_strided"
            )
        if self.warmup_tokens > self.eval_len - 2:
            raise UserError(
                f"warmup_tokens={self.warmup_tokens} leaves nothing to score in windows of eval_len="
                f"{self.eval_len}; use at most {self.eval_len - 2}"
            )

    @property
    def block_windows(self) -> int:
        """Consecutive windows that share tokens: ceil(eval_len / stride), the least block of a block bootstrap."""
        return math.ceil(self.eval_len / self.stride)

    def windows(self, n_tokens: int) -> list[Window]:
        """All windows over `n_tokens` tokens, in order, `max_rows` at most.

        Raises UserError where the text is shorter than one window.
        """
        rule = PROTOCOLS[self.protocol]
        found = [Window(i, *bounds) for i, bounds in enumerate(rule.cut(n_tokens, self))]
        if not found:
            raise UserError(
                f"the text has {n_tokens} tokens, too few for one window of eval_len={self.eval_len} under protocol "
                f"{self.protocol!r}; use a longer text or a smaller eval_len"
            )
        return found[: self.max_rows] if self.max_rows else found


Bounds = list[tuple[int, int, int]]  # (start, end, first_target)


def _exllama(n: int, spec: WindowSpec) -> Bounds:
    # compare_q.py: range(0, num_tokens - eval_len, eval_stride); w warm-up tokens: [-(eval_len - w):][1:] is scored
    starts = range(0, n - spec.eval_len, spec.stride)
    return [(a, a + spec.eval_len, a + spec.warmup_tokens + 1) for a in starts]


def _llamacpp(n: int, spec: WindowSpec) -> Bounds:
    # perplexity.cpp: n_chunk = n / n_ctx; logits first = n_ctx / 2 … n_ctx - 2 predict the token after them
    starts = range(0, n - spec.eval_len + 1, spec.eval_len)
    return [(a, a + spec.eval_len, a + spec.eval_len // 2 + 1) for a in starts]


def _gptq(n: int, spec: WindowSpec) -> Bounds:
    starts = range(0, n - spec.eval_len + 1, spec.eval_len)
    return [(a, a + spec.eval_len, a + 1 + spec.warmup_tokens) for a in starts]


def _sliding(n: int, spec: WindowSpec) -> Bounds:
    if n < spec.eval_len:
        return []
    bounds, scored_to = [], 1  # token 0 has no context
    for start in range(0, n, spec.stride):
        end = min(start + spec.eval_len, n)
        first_target = max(scored_to, start + 1)  # disjoint windows: the first token has no context
        if first_target < end:
            bounds.append((start, end, first_target))
        scored_to = end
        if end == n:
            break
    return bounds


@dataclass(frozen=True)
class WindowProtocol:
    """One row of the table above, with its usual settings and what follows from its definition."""

    cut: Callable[[int, WindowSpec], Bounds]
    eval_len: int
    stride: int
    max_rows: int
    disjoint: bool = False  # stride is eval_len by definition
    warmup: bool = False  # warmup_tokens may be set
    raw_text: bool = False  # tokenizes the raw file instead of "\n\n".join(rows)
    bos_each: bool = False  # BOS replaces the first token of every window, if the vocabulary adds BOS
    covers_text: bool = False  # every token is scored once (but for window starts): bits per byte makes sense


PROTOCOLS: dict[str, WindowProtocol] = {
    "exllama": WindowProtocol(_exllama, 2048, 512, max_rows=20, warmup=True),
    "llamacpp": WindowProtocol(_llamacpp, 512, 512, max_rows=0, disjoint=True, raw_text=True, bos_each=True),
    "gptq": WindowProtocol(_gptq, 2048, 2048, max_rows=0, disjoint=True, warmup=True, covers_text=True),
    "sliding": WindowProtocol(_sliding, 2048, 512, max_rows=0, covers_text=True),
}


def window_ids(tokens: TokenIds, window: Window, bos_id: int | None = None, prefix: Sequence[int] = ()) -> list[int]:
    """The ids a model is given for `window`; with `bos_id` the first one is replaced by it (llama.cpp's way).

    prefix: ids that go before the window and are never scored, such as a chat template's.
    """
    ids: list[int] = tokens[window.start : window.end].tolist()
    if bos_id is not None:
        ids[0] = bos_id
    return [*prefix, *ids]


def fingerprint(
    tokens: TokenIds, windows: Sequence[Window], bos_id: int | None = None, prefix: Sequence[int] = ()
) -> str:
    """sha256 over bounds, scored positions and ids of the windows, exactly as models are given them.

    Two results can be compared number by number if, and only if, this is the same.
    """
    digest = hashlib.sha256()
    for w in windows:
        digest.update(np.array([w.start, w.end, w.first_target], dtype="<i8").tobytes())
        digest.update(np.array(window_ids(tokens, w, bos_id, prefix), dtype="<i8").tobytes())
    return digest.hexdigest()


def scored_spans(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """The scored positions as disjoint, sorted, merged spans [first, end)."""
    spans: list[tuple[int, int]] = []
    for first, end in sorted((w.first_target, w.end) for w in windows):
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((first, end))
    return spans
