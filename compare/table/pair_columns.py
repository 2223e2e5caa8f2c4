"""The columns that --versus adds to a table: the difference and its interval, flips, p-values, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from compare.comparison.comparison import Comparison
from compare.comparison.flips import Flips, Share
from compare.comparison.margins import form_of
from compare.comparison.pairs import NOT_APART, Pair
from compare.comparison.point import Point
from compare.comparison.significance import PairedDifference
from compare.metrics import LossForm, beside_kld
from compare.results.values import number
from compare.table.column import Column
from compare.text import shorten, signed_text

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
    unit = " (points)" if _in_points(comparison) else ""
    yield Column(f"Δ to {shorten(comparison.pairs.label, 24)}{unit}", _difference, _difference_number, always=True)
    yield Column("Verdict", lambda c, p: "≈" if outcome(c, p) == NOT_APART else outcome(c, p), always=True)
    yield Column("p (Holm)", _p, _p_number, always=True)
    if comparison.pairs.margin is not None:
        yield Column(f"p (within {comparison.pairs.margin})", _equivalence_p, _equivalence_number)
    yield Column("Change", _change, _change_number)
    yield Column("Flips", *_share(lambda flips: flips.both))
    yield Column("→ wrong : → right", _directions, _lost)
    yield Column("Other answer", *_share(lambda flips: flips.changed))


def outcome(comparison: Comparison, point: Point) -> str:
    """The verdict on the model (`Pairs.verdict`)."""
    assert comparison.pairs is not None
    return comparison.pairs.verdict(point, comparison.metric.higher_is_better)


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
        "versus_note": pair.reason or (f"over the {pair.note}" if pair.note else None),
        **_ratio_fields(pair.log_ratio),
        **_equivalence_fields(comparison, pair),
        **_flip_fields(pair.flips),
    }


def _ratio_fields(log_ratio: PairedDifference | None) -> dict[str, Any]:
    """The ratio model / baseline of perplexities with its 95 % interval."""
    if log_ratio is None:
        return {}
    values = (log_ratio.value, log_ratio.low, log_ratio.high)
    ratio, low, high = (None if value is None else number(_exp(value)) for value in values)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _equivalence_fields(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    """The margin and its test; nothing without a margin. In points and ratios, 0.01 is one per cent."""
    assert comparison.pairs is not None
    margin, test = comparison.pairs.margin, pair.equivalence
    if margin is None:
        return {}
    return {
        "margin": margin.value,
        "margin_form": margin.form.value,
        "equivalent": pair.equivalent,
        "equivalence_p": test.p if test is not None else None,
        "equivalence_p_holm": pair.equivalence_p_holm,
        "units": pair.difference.units if pair.difference is not None else None,
        "units_needed": test.needed if test is not None else None,
    }


def _flip_fields(flips: Flips | None) -> dict[str, Any]:
    """Counts and shares of changed answers, each with its 95 % interval; none without right or wrong answers."""
    if flips is None:
        return {}
    fields: dict[str, Any] = {"questions": flips.both.total}
    named = (
        ("right_to_wrong", flips.right_to_wrong), ("wrong_to_right", flips.wrong_to_right), ("flips", flips.both),
        ("answers_changed", flips.changed),
    )  # fmt: skip
    for name, share in named:
        fields |= {
            name: share.count if share is not None else None,
            f"{name}_share": share.value if share is not None else None,
            f"{name}_low": share.low if share is not None else None,
            f"{name}_high": share.high if share is not None else None,
        }
    return fields


def _paired(comparison: Comparison, point: Point) -> PairedDifference | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).difference


def _difference(comparison: Comparison, point: Point) -> str:
    """``-2.3 (-3.4 to -1.3)``: the difference and its 95 % interval."""
    difference, scale = _paired(comparison, point), _scale(comparison)
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return signed_text(difference.value * scale, None)
    half = (difference.high - difference.low) / 2 * scale
    value, low, high = (signed_text(each * scale, half) for each in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high})"


def _difference_number(comparison: Comparison, point: Point) -> float | None:
    difference = _paired(comparison, point)
    return None if difference is None else difference.value


def _in_points(comparison: Comparison) -> bool:
    return form_of(comparison.metric, False) is LossForm.POINTS


def _scale(comparison: Comparison) -> float:
    """What a shown difference is in units of the metric: shares are shown in percentage points."""
    return 100.0 if _in_points(comparison) else 1.0


def _p(comparison: Comparison, point: Point) -> str:
    return _p_text(_p_number(comparison, point))


def _p_text(value: float | None) -> str:
    return "" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _p_number(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).p_holm


def _equivalence_p(comparison: Comparison, point: Point) -> str:
    return _p_text(_equivalence_number(comparison, point))


def _equivalence_number(comparison: Comparison, point: Point) -> float | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).equivalence_p_holm


def _change(comparison: Comparison, point: Point) -> str:
    """``+0.42 % (+0.10 to +0.74)``: the ratio of perplexities, less one."""
    change, fields = _change_number(comparison, point), _ratio_fields(_log_ratio(comparison, point))
    if change is None:
        return ""
    low, high = fields["ratio_low"], fields["ratio_high"]
    if low is None or high is None:
        return f"{signed_text(change * 100, None)} %"
    half = (high - low) * 50
    middle, left, right = (signed_text(100 * value, half) for value in (change, low - 1, high - 1))
    return f"{middle} % ({left} to {right})"


def _change_number(comparison: Comparison, point: Point) -> float | None:
    ratio = _ratio_fields(_log_ratio(comparison, point)).get("ratio")
    return None if ratio is None else ratio - 1


def _log_ratio(comparison: Comparison, point: Point) -> PairedDifference | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).log_ratio


def _share(
    chosen: Callable[[Flips], Share | None],
) -> tuple[Callable[[Comparison, Point], str], Callable[[Comparison, Point], float | None]]:
    """Text and number of a column: ``4.1 % (3.0 to 5.5)``."""

    def share_of(comparison: Comparison, point: Point) -> Share | None:
        flips = _flips(comparison, point)
        return None if flips is None else chosen(flips)

    def text(comparison: Comparison, point: Point) -> str:
        share = share_of(comparison, point)
        if share is None:
            return ""
        bounds = (
            "" if share.low is None or share.high is None else f" ({share.low * 100:.1f} to {share.high * 100:.1f})"
        )
        return f"{share.value * 100:.1f} %{bounds}"

    def number_of(comparison: Comparison, point: Point) -> float | None:
        share = share_of(comparison, point)
        return None if share is None else share.value

    return text, number_of


def _flips(comparison: Comparison, point: Point) -> Flips | None:
    assert comparison.pairs is not None
    return comparison.pairs.pair(point).flips


def _directions(comparison: Comparison, point: Point) -> str:
    """``30 : 11``: answers that turned from right to wrong, and from wrong to right."""
    flips = _flips(comparison, point)
    return "" if flips is None else f"{flips.right_to_wrong.count:,} : {flips.wrong_to_right.count:,}"


def _lost(comparison: Comparison, point: Point) -> float | None:
    flips = _flips(comparison, point)
    return None if flips is None else float(flips.right_to_wrong.count)
