"""Exact integer rounding up, for sizes that a float cannot hold."""

from __future__ import annotations


def ceil_div(amount: int, size: int) -> int:
    """Return how many units of `size` hold `amount`: amount / size, rounded up."""
    return -(-amount // size)


def round_up(amount: int, size: int) -> int:
    """Return the smallest multiple of `size` that is at least `amount`."""
    return ceil_div(amount, size) * size
