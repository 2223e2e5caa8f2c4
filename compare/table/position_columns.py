"""The columns that --by-position adds to a table: the metric at the first and last positions, and the slope."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from compare.comparison.by_position import PositionPair, curve_of, estimates, positions_of, slope_of, slope_unit
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.comparison.significance import PairedDifference
from compare.metrics import beside_kld
from compare.table.column import Column
from compare.text import metric_text, shorten, signed_text

# Columns left out to make room; the JSON and CSV tables keep every figure.
_REPLACED = {"Scheme", "Head bpw", "VRAM GB", "vs. ref.", "Kernel", "Engine"}


def replaced(comparison: Comparison) -> set[str]:
    """Headings of the columns that a table with --by-position leaves out."""
    return _REPLACED | {metric.column for metric in beside_kld()} if comparison.options.by_position else set()


def columns(comparison: Comparison) -> Iterator[Column]:
    """The columns; none without --by-position."""
    if not comparison.options.by_position:
        return
    for index, name in ((0, "first"), (-1, "last")):
        yield _bin_column(_bin_heading(comparison, index, name), index)
    yield Column(f"Slope ({slope_unit(comparison.metric)})", _slope, _slope_number, always=True)
    yield Column("95 % interval of the slope", _interval, _low)
    if comparison.position_pairs is not None and comparison.position_pairs.pairs:
        to = f"Δ to {shorten(comparison.position_pairs.label, 24)}"
        for index, name in ((0, "first"), (-1, "last")):
            yield _pair_column(f"{to} a{_bin_heading(comparison, index, name)[1:]}", _at_bin(index))
        yield _pair_column(f"{to} in the slope", lambda pair: pair.slope)


def fields(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The fields of the JSON and CSV tables; none without --by-position."""
    if not comparison.options.by_position:
        return {}
    slope, found = slope_of(point, comparison.metric), estimates(point, comparison.metric)
    half = slope.half_width if slope is not None else None
    names = positions_of(point).bin_names() if found else []
    return {
        "slope": slope.value if slope is not None else None,
        "slope_low": slope.value - half if slope is not None and half is not None else None,
        "slope_high": slope.value + half if slope is not None and half is not None else None,
        "slope_unit": slope_unit(comparison.metric),
        "position_blocks": positions_of(point).blocks if found else None,
        **{
            f"{_field(name)}{suffix}": value
            for name, estimate in zip(names, found, strict=True)
            for suffix, value in (
                ("", estimate.value if estimate is not None else None),
                ("_half_width", estimate.half_width if estimate is not None else None),
            )
        },
        **_pair_fields(comparison, point, names),
    }


def _pair_fields(comparison: Comparison, point: Point, names: list[str]) -> dict[str, Any]:
    """The differences at every bin and in the slope, with their intervals; none without --versus."""
    if comparison.position_pairs is None:
        return {}
    pair = comparison.position_pairs.pairs.get(id(point))
    found = {"slope": pair.slope if pair else None}
    found |= {_field(name): difference for name, difference in zip(names, pair.bins if pair else (), strict=False)}
    return {
        f"difference_{name}{suffix}": getattr(difference, attribute) if difference is not None else None
        for name, difference in found.items()
        for suffix, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _field(name: str) -> str:
    """``at_16_31``: the field of a bin."""
    return f"at_{name.replace('–', '_')}"


def note(comparison: Comparison, points: list[Point]) -> str:
    """The line below a section; empty without --by-position, and where no model has figures by position."""
    shown = [point for point in points if curve_of(point, comparison.metric) is not None]
    if not comparison.options.by_position or not shown:
        return ""
    blocks = " or ".join(str(n) for n in sorted({positions_of(point).blocks for point in shown}))
    label = comparison.position_pairs.label if comparison.position_pairs is not None else ""
    paired = (
        f" Δ is model − {label}, in pairs by block, each with its own 95 % interval; ≈: zero is in it." if label else ""
    )
    return (
        "By position, the number of tokens of the window before the predicted one: slope of the least-squares line of "
        f"all tokens over log2(position). Intervals: t over {blocks} blocks of windows; fewer than five give none."
        + paired
    )


def _bin_heading(comparison: Comparison, index: int, name: str) -> str:
    """``At 16384–32767``; ``At the last positions`` where the models' bins differ."""
    shown = [p for p in comparison.points if curve_of(p, comparison.metric) is not None]
    names = {positions_of(point).bin_names()[index] for point in shown}
    return f"At {names.pop()}" if len(names) == 1 else f"At the {name} positions"


def _bin_column(heading: str, index: int) -> Column:
    def number(comparison: Comparison, point: Point) -> float | None:
        found = estimates(point, comparison.metric)
        estimate = found[index] if found else None
        return None if estimate is None else estimate.value

    def text(comparison: Comparison, point: Point) -> str:
        value = number(comparison, point)
        return "" if value is None else metric_text(value)

    return Column(heading, text, number)


def _at_bin(index: int) -> Callable[[PositionPair], PairedDifference | None]:
    return lambda pair: pair.bins[index]


def _pair_column(heading: str, part: Callable[[PositionPair], PairedDifference | None]) -> Column:
    def difference(comparison: Comparison, point: Point) -> PairedDifference | None:
        pair = comparison.position_pairs.pairs.get(id(point)) if comparison.position_pairs is not None else None
        return part(pair) if pair is not None else None

    def number(comparison: Comparison, point: Point) -> float | None:
        found = difference(comparison, point)
        return None if found is None else found.value

    def text(comparison: Comparison, point: Point) -> str:
        found = difference(comparison, point)
        if found is None or found.low is None or found.high is None:
            return "" if found is None else signed_text(found.value, None)
        half = (found.high - found.low) / 2
        mark = "≈ " if found.low <= 0 <= found.high else ""
        return f"{mark}{signed_text(found.value, half)} ± {signed_text(half, half)[1:]}"

    return Column(heading, text, number)


def _slope(comparison: Comparison, point: Point) -> str:
    slope = slope_of(point, comparison.metric)
    return "" if slope is None else signed_text(slope.value, slope.half_width)


def _slope_number(comparison: Comparison, point: Point) -> float | None:
    slope = slope_of(point, comparison.metric)
    return None if slope is None else slope.value


def _interval(comparison: Comparison, point: Point) -> str:
    slope = slope_of(point, comparison.metric)
    if slope is None or slope.half_width is None:
        return ""
    low, high = slope.value - slope.half_width, slope.value + slope.half_width
    return f"{signed_text(low, slope.half_width)} to {signed_text(high, slope.half_width)}"


def _low(comparison: Comparison, point: Point) -> float | None:
    slope = slope_of(point, comparison.metric)
    return None if slope is None or slope.half_width is None else slope.value - slope.half_width
