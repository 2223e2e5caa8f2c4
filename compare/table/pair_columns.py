"""The columns that --versus adds to a table: the difference, its interval, its p-value, and the outcome."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.comparison.significance import PairedDifference
from compare.metrics import beside_kld
from compare.table.column import Column
from compare.text import shorten, signed_text

NOT_APART = "not told apart"
# Columns left out to make room for those of the pairs; the JSON and CSV tables keep every figure.
_REPLACED = {"Family", "Scheme", "Head bpw", "VRAM GB", "vs. ref.", "Kernel", "Engine"}


def replaced(comparison: Comparison) -> set[str]:
    """Headings of the columns that a table with pairs leaves out."""
    if comparison.pairs is None:
        return set()
    headings = _REPLACED | {metric.column for metric in beside_kld()}
    return headings - {"VRAM GB"} if comparison.axis.key == "vram" else headings


def columns(comparison: Comparison) -> Iterator[Column]:
    """Columns of the pairs; none without --versus."""
    if comparison.pairs is None:
        return
    yield Column(f"Δ to {shorten(comparison.pairs.label, 24)}", _difference, _difference_number, always=True)
    yield Column("95 % interval", _interval, lambda c, p: _low(c, p), always=True)
    yield Column("p (Holm)", _p, _p_number, always=True)
    yield Column("Verdict", lambda c, p: "≈" if outcome(c, p) == NOT_APART else outcome(c, p), always=True)


def outcome(comparison: Comparison, point: Point) -> str:
    """``better``, ``worse``, ``not told apart``, ``too few windows`` …: the model against the baseline."""
    assert comparison.pairs is not None
    pair, higher_is_better = comparison.pairs.pair(point), comparison.metric.higher_is_better
    if pair.is_baseline:
        return "baseline"
    if pair.difference is None:
        return "no pair"
    if pair.separated is None:
        return "too few windows" if point.record.protocol.name else "too few documents"
    if not pair.separated:
        return NOT_APART
    if higher_is_better is None:
        return "differs"
    return "better" if (pair.difference.value > 0) == higher_is_better else "worse"


def fields(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The fields of the JSON and CSV tables, with the reason where there is no pair; none without --versus."""
    if comparison.pairs is None:
        return {}
    pair = comparison.pairs.pair(point)
    difference = pair.difference
    return {
        "versus": comparison.pairs.label,
        "difference": difference.value if difference is not None else None,
        "difference_low": difference.low if difference is not None else None,
        "difference_high": difference.high if difference is not None else None,
        "p": difference.p if difference is not None else None,
        "p_holm": pair.p_holm,
        "separated": pair.separated,
        "verdict": outcome(comparison, point),
        "versus_method": difference.method if difference is not None else None,
        "versus_note": pair.reason or None,
    }


def _paired(comparison: Comparison, point: Point) -> PairedDifference | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).difference


def _difference(comparison: Comparison, point: Point) -> str:
    value = _difference_number(comparison, point)
    return "" if value is None else signed_text(value, _half_width(comparison, point))


def _difference_number(comparison: Comparison, point: Point) -> float | None:
    difference = _paired(comparison, point)
    return None if difference is None else difference.value


def _interval(comparison: Comparison, point: Point) -> str:
    difference, half_width = _paired(comparison, point), _half_width(comparison, point)
    if difference is None or difference.low is None or difference.high is None:
        return ""
    return f"{signed_text(difference.low, half_width)} to {signed_text(difference.high, half_width)}"


def _low(comparison: Comparison, point: Point) -> float | None:
    difference = _paired(comparison, point)
    return None if difference is None else difference.low


def _half_width(comparison: Comparison, point: Point) -> float | None:
    """Half the width of the interval."""
    difference = _paired(comparison, point)
    if difference is None or difference.low is None or difference.high is None:
        return None
    return (difference.high - difference.low) / 2


def _p(comparison: Comparison, point: Point) -> str:
    value = _p_number(comparison, point)
    return "" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _p_number(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).p_holm
