"""Windows against the loops of the tools that defined the protocols, and against properties that must hold."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.protocols import PROTOCOLS, Window, WindowSpec, fingerprint, scored_spans, window_ids

lengths = st.integers(2, 64)


def bounds(protocol: str, n: int, eval_len: int, stride: int, **more: int) -> list[tuple[int, int, int]]:
    spec = WindowSpec(protocol, eval_len, stride, **more)
    return [(w.start, w.end, w.first_target) for w in spec.windows(n)]


def test_exllama_windows_match_bounds_by_hand() -> None:
    # 10 tokens, windows of 4 every 2: starts 0, 2, 4 (6 is not < 10 - 4)
    assert bounds("exllama", 10, 4, 2) == [(0, 4, 1), (2, 6, 3), (4, 8, 5)]
    assert bounds("exllama", 10, 4, 2, max_rows=2) == [(0, 4, 1), (2, 6, 3)]
    assert bounds("exllama", 10, 4, 2, warmup_tokens=1) == [(0, 4, 2), (2, 6, 4), (4, 8, 6)]


def test_llamacpp_scores_255_of_512() -> None:
    windows = WindowSpec("llamacpp", 512, 512).windows(1100)
    assert [(w.start, w.end, w.first_target, w.scored) for w in windows] == [
        (0, 512, 257, 255),
        (512, 1024, 769, 255),
    ]


def test_sliding_windows_match_bounds_by_hand() -> None:
    # the guide's loop over 9 tokens, max_length 4, stride 2; the last window is ragged
    assert bounds("sliding", 9, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]


def test_twenty_windows_match_an_independent_implementation() -> None:
    """Counted by an independent implementation: 20 windows of 304,978 tokens score 40,940 targets, 11,775 distinct."""
    strided = WindowSpec("exllama", 2048, 512, max_rows=20).windows(304_978)
    sliding = WindowSpec("sliding", 2048, 512, max_rows=20).windows(304_978)
    assert sum(w.scored for w in strided) == 40_940
    assert sum(e - s for s, e in scored_spans(strided)) == 11_775
    assert sum(w.scored for w in sliding) == 11_775


@given(n=st.integers(2, 400), eval_len=lengths, stride=lengths)
def test_sliding_scores_each_token_once(n: int, eval_len: int, stride: int) -> None:
    if stride >= eval_len or n < eval_len:
        return
    windows = WindowSpec("sliding", eval_len, stride).windows(n)
    scored = [t for w in windows for t in range(w.first_target, w.end)]
    assert scored == list(range(1, n))
    assert max(w.end - w.start for w in windows) <= eval_len


def test_disjoint_sliding_skips_tokens_without_context() -> None:
    # the guide's loop shifts labels, so a window's first token is never scored; token 8 would be a window by itself
    assert bounds("sliding", 9, 4, 4) == [(0, 4, 1), (4, 8, 5)]


@given(n=st.integers(2, 400), eval_len=lengths, stride=lengths, rows=st.integers(0, 5))
def test_windows_are_valid_for_every_protocol(n: int, eval_len: int, stride: int, rows: int) -> None:
    for protocol, row in PROTOCOLS.items():
        if row.disjoint:
            stride = eval_len
        if stride > eval_len or (protocol == "llamacpp" and eval_len < 4):
            continue
        spec = WindowSpec(protocol, eval_len, stride, max_rows=rows)
        if n < eval_len or (n == eval_len and protocol == "exllama"):
            with pytest.raises(UserError, match="too few"):
                spec.windows(n)
            continue
        windows = spec.windows(n)
        assert [w.index for w in windows] == list(range(len(windows)))
        assert not rows or len(windows) <= rows
        for w in windows:
            assert 0 <= w.start < w.first_target < w.end <= n


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("exllama", 8, 0), "stride=0"),
        (("exllama", 8, 9), "stride=9 is larger than eval_len=8"),
        (("exllama", 1, 1), "eval_len=1"),
        (("exllama", 8, 4, -1), "max_rows=-1"),
        (("exllama", 8, 4, 0, 7), "warmup_tokens=7 leaves nothing"),
        (("exllama", "8", 4), "eval_len='8'"),
        (("gptq", 8, 4), "disjoint"),
        (("sliding", 8, 4, 0, 2), "fixes its scored positions"),
        (("nonsense", 8, 4), "choose one of exllama"),
    ],
)
def test_invalid_setting_raises_and_is_named(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        WindowSpec(*arguments)


def test_text_shorter_than_a_window_raises() -> None:
    for protocol in ("exllama", "sliding"):
        with pytest.raises(UserError, match="the text has 7 tokens, too few"):
            WindowSpec(protocol, 8, 4).windows(7)


def test_bos_replaces_the_first_token_and_keeps_the_length() -> None:
    ids = np.arange(10)
    assert window_ids(ids, Window(0, 2, 6, 3), bos_id=99) == [99, 3, 4, 5]
    assert window_ids(ids, Window(0, 2, 6, 3)) == [2, 3, 4, 5]


def test_fingerprint_is_the_documented_hash() -> None:
    ids = np.array([7, 8, 9, 10])
    by_hand = hashlib.sha256(struct.pack("<3q", 1, 4, 2) + struct.pack("<3q", 8, 9, 10)).hexdigest()
    assert fingerprint(ids, [Window(0, 1, 4, 2)]) == by_hand
    assert fingerprint(ids, [Window(0, 1, 4, 3)]) != by_hand  # other scored positions
    assert fingerprint(ids, [Window(0, 1, 4, 2)], bos_id=1) != by_hand


def test_block_windows_is_the_number_of_windows_that_share_tokens() -> None:
    assert WindowSpec("exllama", 2048, 512).block_windows == 4
    assert WindowSpec("exllama", 2048, 600).block_windows == 4
    assert WindowSpec("gptq", 2048, 2048).block_windows == 1
