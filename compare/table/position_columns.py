"""The columns that --by-position adds to a table: the metric at the first and last positions, and the slope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compare.comparison.by_position import curve_of, estimates, positions_of, slope_of, slope_unit
from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.metrics import beside_kld
from compare.table.column import Column
from compare.text import metric_text, signed_text

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
            f"at_{name.replace('–', '_')}{suffix}": value
            for name, estimate in zip(names, found, strict=True)
            for suffix, value in (
                ("", estimate.value if estimate is not None else None),
                ("_half_width", estimate.half_width if estimate is not None else None),
            )
        },
    }


def note(comparison: Comparison, points: list[Point]) -> str:
    """The line below a section; empty without --by-position, and where no model has figures by position."""
    shown = [point for point in points if curve_of(point, comparison.metric) is not None]
    if not comparison.options.by_position or not shown:
        return ""
    blocks = " or ".join(str(n) for n in sorted({positions_of(point).blocks for point in shown}))
    return (
        "By position, the number of tokens of the window before the predicted one: slope of the least-squares line of "
        f"all tokens over log2(position). Intervals: t over {blocks} blocks of windows; fewer than five give none."
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
