"""Rounding up of sizes, exact where a float is not."""

from __future__ import annotations

import pytest

from lmeval_ext.storage.rounding import ceil_div, round_up


@pytest.mark.parametrize(
    ("amount", "size", "units"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**60 + 1, 2, 2**59 + 1)]
)
def test_ceil_div_and_round_up_are_exact(amount: int, size: int, units: int) -> None:
    assert ceil_div(amount, size) == units
    assert round_up(amount, size) == units * size
