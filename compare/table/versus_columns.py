"""What --versus adds to a table: the difference, its interval, its p-value, and what that says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.table.column import Column
from compare.text import shorten

NOT_APART = "not told apart"
# Columns that make room for these; the JSON and CSV tables keep every figure.
_REPLACED = {"Family", "Scheme", "Head bpw", "VRAM GB", "vs. ref.", "Kernel", "Engine", "Median", "99 %",
             "Top-1 agreement", "PPL ratio"}  # fmt: skip


def replaced(comparison: Comparison) -> set[str]:
    """Headings that a table with pairs does without."""
    if comparison.pairs is None:
        return set()
    return _REPLACED - {"VRAM GB"} if comparison.axis.key == "vram" else _REPLACED


def columns(comparison: Comparison) -> Iterator[Column]:
    """Columns of the pairs; none without --versus."""
    if comparison.pairs is None:
        return
    yield Column(f"Δ to {shorten(comparison.pairs.label, 24)}", _difference, _difference_number, always=True)
    yield Column("95 % interval", _interval, lambda c, p: _low(c, p), always=True)
    yield Column("p (Holm)", _p, _p_number, always=True)
    yield Column("Verdict", lambda c, p: "≈" if verdict(c, p) == NOT_APART else verdict(c, p), always=True)


def verdict(comparison: Comparison, point: Point) -> str:
    """``better``, ``worse``, ``not told apart``, ``too few windows`` …"""
    assert comparison.pairs is not None
    pair, higher = comparison.pairs.pair(point), comparison.metric.higher_is_better
    if pair.baseline:
        return "baseline"
    if pair.verdict is None:
        return "no pair"
    if pair.separated is None:
        return "too few windows" if point.record.protocol.name else "too few documents"
    if not pair.separated:
        return NOT_APART
    if higher is None:
        return "differs"
    return "better" if (pair.verdict.difference > 0) == higher else "worse"


def fields(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The same for the JSON and CSV tables, and the reason where there is no pair."""
    if comparison.pairs is None:
        return {}
    pair = comparison.pairs.pair(point)
    found = pair.verdict
    return {
        "versus": comparison.pairs.label,
        "difference": found.difference if found is not None else None,
        "difference_low": found.low if found is not None else None,
        "difference_high": found.high if found is not None else None,
        "p": found.p if found is not None else None,
        "p_holm": pair.p_holm,
        "separated": pair.separated,
        "verdict": verdict(comparison, point),
        "versus_method": found.method if found is not None else None,
        "versus_note": pair.reason or None,
    }


def _difference(comparison: Comparison, point: Point) -> str:
    value = _difference_number(comparison, point)
    return "" if value is None else _signed(value, _half(comparison, point))


def _difference_number(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    found = comparison.pairs.pair(point).verdict
    return None if found is None else found.difference


def _interval(comparison: Comparison, point: Point) -> str:
    assert comparison.pairs is not None
    found, half = comparison.pairs.pair(point).verdict, _half(comparison, point)
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{_signed(found.low, half)} to {_signed(found.high, half)}"


def _low(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    found = comparison.pairs.pair(point).verdict
    return None if found is None else found.low


def _half(comparison: Comparison, point: Point) -> float | None:
    """Half the interval's width."""
    assert comparison.pairs is not None
    found = comparison.pairs.pair(point).verdict
    return None if found is None or found.low is None or found.high is None else (found.high - found.low) / 2


def _signed(value: float, half: float | None) -> str:
    """As many decimals as give half the interval's width two digits."""
    if not half or not 1e-6 < half < 1e6:
        return f"{value:+.3g}"
    return f"{value:+.{max(0, 1 - math.floor(math.log10(half)))}f}"


def _p(comparison: Comparison, point: Point) -> str:
    value = _p_number(comparison, point)
    return "" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _p_number(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).p_holm
