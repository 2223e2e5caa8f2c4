"""Perplexity protocols: how a token sequence is cut into windows, and which tokens of each window are scored.

A *window* is a slice of the text's tokens that a model sees at once. Its last positions are *scored*; the ones before
are context. Published perplexities differ mainly in how they cut windows, so each way is a protocol with a name:

============ ======================================== ============================ ===========================
protocol     windows                                  scored targets               used by
============ ======================================== ============================ ===========================
exllama      every `stride` while start < n-eval_len  all but the first token      ExLlamaV3 eval/compare_q.py
llamacpp     disjoint                                 those after the middle + 1   llama.cpp tools/perplexity
gptq         disjoint                                 all but the first token      GPTQ's opt.py, papers since
sliding      every `stride`, ragged at the end        each token of the text once  Transformers' guide [1]_
long_strided every `stride` while they fit            all but the first token      this project: long windows
============ ======================================== ============================ ===========================

.. [1] "Perplexity of fixed-length models" in the Transformers documentation.

`PROTOCOLS` has one row per protocol, a `WindowProtocol`. A `WindowSpec` is a protocol with its settings, and cuts the
`Window`s. To add a protocol: one function that cuts windows, one row of `PROTOCOLS`, one YAML file that names it, and a
test against the original tool's loop (`tests/tasks/test_protocols.py`). All functions here are pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmeval_ext.errors import UserError
from lmeval_ext.storage.rounding import ceil_div
from lmeval_ext.tokens import TokenIds


@dataclass(frozen=True)
class Window:
    """Positions of one window in the text's tokens: the model sees [start, end), and [first_target, end) is scored.

    Always start < first_target < end: the first token of a window has no context and is never scored.
    """

    index: int
    start: int
    end: int
    first_target: int

    @property
    def scored(self) -> int:
        """Return the number of scored targets."""
        return self.end - self.first_target


@dataclass(frozen=True)
class WindowSpec:
    """A protocol with its settings, which together determine the windows and their scored positions.

    protocol: a key of `PROTOCOLS`. eval_len: tokens per window. stride: tokens from one window's start to the next
    one's. max_rows: number of windows to score, from the first on, 0 for all. warmup_tokens: additional positions at
    the start of each window that are context only. Raises UserError for values that the protocol does not allow.
    """

    protocol: str
    eval_len: int
    stride: int
    max_rows: int = 0
    warmup_tokens: int = 0

    def __post_init__(self) -> None:
        protocol = find_protocol(self.protocol)
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
        if protocol.disjoint and self.stride != self.eval_len:
            raise UserError(
                f"stride={self.stride}: the windows of protocol {self.protocol!r} are disjoint; leave stride out, "
                "or use the task wiki2_strided for overlapping windows"
            )
        if self.warmup_tokens and not protocol.warmup:
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
        """Return how many consecutive windows share tokens, the smallest block of a block bootstrap.

        This is eval_len / stride, rounded up.
        """
        return ceil_div(self.eval_len, self.stride)

    def windows(self, n_tokens: int) -> list[Window]:
        """Return the windows over `n_tokens` tokens, in order, at most `max_rows` of them.

        Raises UserError if the text is too short for one window.
        """
        bounds = PROTOCOLS[self.protocol].cut(n_tokens, self)
        windows = [Window(index, *positions) for index, positions in enumerate(bounds)]
        if not windows:
            raise UserError(
                f"the text has {n_tokens} tokens, too few for one window of eval_len={self.eval_len} under protocol "
                f"{self.protocol!r}; use a longer text or a smaller eval_len"
            )
        return windows[: self.max_rows] if self.max_rows else windows


Bounds = list[tuple[int, int, int]]  # (start, end, first_target)


def _exllama(n: int, spec: WindowSpec) -> Bounds:
    """Cut ExLlamaV3's windows (eval/compare_q.py): range(0, num_tokens - eval_len, eval_stride).

    With w warm-up tokens, [-(eval_len - w):][1:] of each window is scored.
    """
    starts = range(0, n - spec.eval_len, spec.stride)
    return [(a, a + spec.eval_len, a + spec.warmup_tokens + 1) for a in starts]


def _llamacpp(n: int, spec: WindowSpec) -> Bounds:
    """Cut llama.cpp's windows (tools/perplexity/perplexity.cpp): n / n_ctx chunks of n_ctx tokens.

    The logits at first = n_ctx / 2 to n_ctx - 2 are used; each predicts the token after it.
    """
    starts = range(0, n - spec.eval_len + 1, spec.eval_len)
    return [(a, a + spec.eval_len, a + spec.eval_len // 2 + 1) for a in starts]


def _gptq(n: int, spec: WindowSpec) -> Bounds:
    """Cut GPTQ's windows (opt.py, and the papers since): disjoint, all but the first token scored."""
    starts = range(0, n - spec.eval_len + 1, spec.eval_len)
    return [(a, a + spec.eval_len, a + 1 + spec.warmup_tokens) for a in starts]


def _sliding(n: int, spec: WindowSpec) -> Bounds:
    """Cut the windows of the Transformers guide "Perplexity of fixed-length models": each token is scored once."""
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


def _long_strided(n: int, spec: WindowSpec) -> Bounds:
    """Cut windows every `stride` while they fit, all but the first token scored."""
    starts = range(0, n - spec.eval_len + 1, spec.stride)
    return [(a, a + spec.eval_len, a + 1 + spec.warmup_tokens) for a in starts]


@dataclass(frozen=True)
class WindowProtocol:
    """One row of `PROTOCOLS`: how windows are cut, the usual settings, and what the protocol's definition implies.

    cut: from the number of tokens and the settings to the windows' bounds. eval_len, stride, max_rows: usual settings,
    as in `WindowSpec`; a stride of None is eval_len. disjoint: the stride is eval_len by definition. warmup:
    warmup_tokens may be set. raw_text: the raw file is tokenized, not "\\n\\n".join(rows). bos_each: BOS replaces the
    first token of every window, if the vocabulary adds BOS. covers_text: every token is scored once, except at window
    starts, so bits per byte is defined.
    """

    cut: Callable[[int, WindowSpec], Bounds]
    eval_len: int
    stride: int | None
    max_rows: int
    disjoint: bool = False
    warmup: bool = False
    raw_text: bool = False
    bos_each: bool = False
    covers_text: bool = False


PROTOCOLS: dict[str, WindowProtocol] = {
    "exllama": WindowProtocol(_exllama, 2048, 512, max_rows=20, warmup=True),
    "llamacpp": WindowProtocol(_llamacpp, 512, 512, max_rows=0, disjoint=True, raw_text=True, bos_each=True),
    "gptq": WindowProtocol(_gptq, 2048, 2048, max_rows=0, disjoint=True, warmup=True, covers_text=True),
    "sliding": WindowProtocol(_sliding, 2048, 512, max_rows=0, covers_text=True),
    "long_strided": WindowProtocol(_long_strided, 32768, None, max_rows=0, warmup=True, bos_each=True),
}


def find_protocol(name: str) -> WindowProtocol:
    """Return the protocol of a name. Raises UserError if it is unknown."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol={name!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def window_ids(tokens: TokenIds, window: Window, bos_id: int | None = None, prefix: Sequence[int] = ()) -> list[int]:
    """Return the ids that a model is given for `window`.

    bos_id: replaces the first id, as llama.cpp does it; None keeps it. prefix: ids before the window that are never
    scored, such as a chat template's.
    """
    ids: list[int] = tokens[window.start : window.end].tolist()
    if bos_id is not None:
        ids[0] = bos_id
    return [*prefix, *ids]


def fingerprint(
    tokens: TokenIds, windows: Sequence[Window], bos_id: int | None = None, prefix: Sequence[int] = ()
) -> str:
    """Return the sha256 over bounds, scored positions and ids of the windows, exactly as models are given them.

    Two results can be compared number by number if, and only if, their fingerprints are equal. The hash is over
    little-endian int64: start, end, first_target and then the ids, window by window.
    """
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([window.start, window.end, window.first_target], dtype="<i8").tobytes())
        digest.update(np.array(window_ids(tokens, window, bos_id, prefix), dtype="<i8").tobytes())
    return digest.hexdigest()


def scored_spans(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """Return the scored positions as sorted, disjoint spans [first, end); spans that touch are merged."""
    spans: list[tuple[int, int]] = []
    for first, end in sorted((w.first_target, w.end) for w in windows):
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((first, end))
    return spans
