"""Whole-number arithmetic that several rooms share."""

from __future__ import annotations


def ceil_div(dividend: int, divisor: int) -> int:
    """⌈dividend / divisor⌉, exact for integers of any size."""
    return -(-dividend // divisor)
