"""The columns of the tables for readers, as text: terminal, Markdown, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from compare.comparison.axis import MEMORY
from compare.comparison.comparison import Comparison
from compare.comparison.memory import GIB, Room, fit, longest_context, memory_bytes
from compare.comparison.point import Point, caveats, stated_by
from compare.results.records import Quantization
from compare.table import divergence_columns, pair_columns, position_columns
from compare.table.column import Column
from compare.table.rows import relative
from compare.text import and_more, figure_text, metric_text


def relative_text(comparison: Comparison, point: Point) -> str:
    """``+1.25%``, or a factor from 10 on; empty without a baseline."""
    change = relative(comparison, point)
    if change is None:
        return ""
    return f"{change:+.2%}" if abs(change) < 10 else f"×{change + 1:.4g}"


def _kernel_text(_: Comparison, point: Point) -> str:
    q = point.record.quantization
    return f"{q.kernel or ''} (weight-only)".strip() if q.runs_other_than_named else q.kernel or ""


def _bits(digits: str, value: Callable[[Quantization], float | None]) -> dict[str, Any]:
    """The text and number of a `Column` for a figure of the quantization block."""
    return {
        "text": lambda c, p: figure_text(value(p.record.quantization), digits),
        "number": lambda c, p: value(p.record.quantization),
    }


COLUMNS: tuple[Column, ...] = (
    Column("Model", lambda c, p: p.record.label, always=True),
    Column("Family", lambda c, p: p.record.quantization.family, always=True),
    Column("Scheme", lambda c, p: p.record.quantization.scheme),
    Column("bpw", **_bits(".3f", lambda q: q.layer_bpw), always=True),
    Column("Head bpw", **_bits(".2f", lambda q: q.head_bpw), always=True),
    Column("VRAM GB", **_bits(".3f", lambda q: q.vram_gb), always=True),
    Column("", lambda c, p: _axis_text(c, p), lambda c, p: _axis_number(c, p)),
    Column("Fits", lambda c, p: _fit_text(c, p)),
    Column("Longest context", lambda c, p: _context_text(c, p), lambda c, p: _context_tokens(c, p)),
    Column("Metric", lambda c, p: metric_text(p.y, p.stderr), lambda c, p: p.y, always=True),
    Column("Not a number", lambda c, p: and_more(list(p.record.not_numbers), 2)),
    Column("vs. ref.", relative_text, relative),
    Column("Pareto", lambda c, p: "●" if id(p) in c.on_frontier else ""),
    Column("Engine", lambda c, p: p.record.quantization.engine),
    Column("Kernel", _kernel_text),
)


_AXIS_HEADINGS = {"file_bpw": "File bpw", "size": "Size GB", MEMORY: "Memory GB"}


def _axis_text(comparison: Comparison, point: Point) -> str:
    """The value on the axis, if no other column shows it; with a budget, the memory compared with it."""
    shown = comparison.verdict is not None or comparison.axis.key in _AXIS_HEADINGS
    return figure_text(_axis_number(comparison, point), ".3f") if shown else ""


def _axis_number(comparison: Comparison, point: Point) -> float | None:
    if comparison.verdict is not None:
        needed = memory_bytes(point.record.quantization, comparison.verdict.budget.context)
        return None if needed is None else needed / GIB
    return point.x


def _fit_text(comparison: Comparison, point: Point) -> str:
    verdict = comparison.verdict
    if verdict is None or not point.comparable:
        return ""
    text = fit(point.record.quantization, verdict.budget).value
    return f"{text}, best" if point is verdict.best else text


def _room(comparison: Comparison, point: Point) -> Room | None:
    verdict = comparison.verdict
    return None if verdict is None else longest_context(point.record.quantization, verdict.budget.gib)


def _context_text(comparison: Comparison, point: Point) -> str:
    """The tokens of cache that fit beside the weights into the budget; empty without a budget."""
    room = _room(comparison, point)
    return "–" if room is None and comparison.verdict is not None else str(room or "")


def _context_tokens(comparison: Comparison, point: Point) -> float | None:
    room = _room(comparison, point)
    return None if room is None else math.inf if room.tokens is None else room.tokens


def _heading(column: Column, comparison: Comparison) -> str:
    names = {
        "Metric": comparison.metric.name,
        "": "Memory GB" if comparison.verdict is not None else _AXIS_HEADINGS.get(comparison.axis.key, ""),
    }
    return names.get(column.heading, column.heading)


@dataclass(frozen=True)
class Section:
    """Rows that are comparable with each other, as texts, and what they were scored on.

    note: a text below the table.
    """

    caption: str
    headings: list[str]
    right: list[bool]
    rows: list[list[str]]
    columns: list[Column]
    points: list[Point]
    note: str = ""


def sections(comparison: Comparison) -> Iterator[Section]:
    """The comparison first, then each group of points kept apart."""
    groups = sorted({point.group for point in comparison.points})
    candidates = _candidates(comparison)
    for group in groups:
        points = [point for point in comparison.points if point.group == group]
        texts = [[column.text(comparison, point) for column in candidates] for point in points]
        used = [c.always or any(line[i] for line in texts) for i, c in enumerate(candidates)]
        columns = [column for column, keep in zip(candidates, used, strict=True) if keep]
        yield Section(
            caption=_caption(comparison, points[0]),
            headings=[_heading(column, comparison) for column in columns],
            right=[column.right for column in columns],
            rows=[[cell for cell, keep in zip(line, used, strict=True) if keep] for line in texts],
            columns=columns,
            points=points,
            note="\n".join(_notes(comparison, points)),
        )


def _notes(comparison: Comparison, points: list[Point]) -> Iterator[str]:
    """The lines below a section: how pairs were formed, and what is unknown of a model or told by the user."""
    if comparison.pairs is not None:
        yield comparison.pairs.about
    if by_position := position_columns.note(comparison, points):
        yield by_position
    yield from caveats(points)


def _candidates(comparison: Comparison) -> list[Column]:
    """`COLUMNS`, with the tasks of a mean, the pairs and the columns beside a divergence after the metric."""
    at = next(i for i, column in enumerate(COLUMNS) if column.heading == "Metric") + 1
    tasks = [_task_column(comparison, i) for i in range(len(comparison.parts))]
    beside = [
        *pair_columns.columns(comparison), *position_columns.columns(comparison),
        *divergence_columns.columns(comparison),
    ]  # fmt: skip
    replaced = pair_columns.replaced(comparison) | position_columns.replaced(comparison)
    columns = [*COLUMNS[:at], *tasks, *beside, *COLUMNS[at:]]
    return [column for column in columns if column.heading not in replaced]


def _task_column(comparison: Comparison, index: int) -> Column:
    metric = comparison.parts[index]
    heading = metric.label if metric in comparison.metric.averaged else f"{metric.label} (not in the mean)"

    def text(_: Comparison, point: Point) -> str:
        figure = point.parts[index].figure
        return metric_text(figure.value, figure.stderr)

    return Column(heading, text, lambda _, point: point.parts[index].figure.value, always=True)


def _caption(comparison: Comparison, point: Point) -> str:
    """What the rows of a section were scored on, and with what they are compared. point: one of the section."""
    protocol, metric = point.record.protocol, comparison.metric
    about = (*protocol.harness, *protocol.configured) if not (protocol.has_windows or metric.averaged) else ()
    parts = [metric.task, protocol.text, protocol.describe(), *about]
    if metric.averaged:
        parts.append(f"over {and_more([m.label for m in metric.averaged], 20)}, each counting alike")
    if protocol.missing and not metric.averaged:
        parts.append(f"its file does not say: {', '.join(protocol.missing)}")
    if protocol.scored_tokens:
        parts.append(f"{protocol.scored_tokens:,} tokens scored")
    if point.comparable and comparison.baseline is not None:
        parts.append(f"ref. = {comparison.baseline.record.label}{stated_by(comparison.baseline)}")
    if metric.row.needs_reference and point.record.divergence is not None:
        parts.append(f"reference: {point.record.divergence.reference.describe()}")
    if point.comparable and comparison.noise_floor is not None:
        parts.append(f"noise floor: {comparison.noise_floor}")
    if point.comparable and comparison.mixed_in:
        parts.append(f"mixed as asked with others: {and_more([p.record.label for p in comparison.mixed_in])}")
    caption = ", ".join(part for part in parts if part)
    return caption if point.comparable else f"Not comparable with the above: {caption}"
