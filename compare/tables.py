"""A comparison as a table: terminal (rich), Markdown, CSV, JSON.

JSON and CSV hold everything at full precision, one record a row; terminal and Markdown what a reader needs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from compare.comparison import GIB, Comparison, Point
from compare.records import PERPLEXITY
from compare.text import csv_cell, markdown, shorten

_MAX_LABEL = 72
_MANY_ROWS = 500


def row(comparison: Comparison, point: Point) -> dict[str, Any]:
    """Everything known of one point. `ppl` is its token perplexity, whatever metric is compared."""
    record, q, protocol = point.record, point.record.quantization, point.record.protocol
    return {
        "label": record.label,
        "layer_bpw": q.layer_bpw,
        "head_bpw": q.head_bpw,
        "vram_gb": q.vram_gb,
        "ppl": record.metric(f"{PERPLEXITY},none").value,
        "task": record.task,
        "metric": comparison.metric.key,
        "value": point.y,
        "stderr": point.stderr,
        "higher_is_better": comparison.metric.higher_is_better,
        "relative_to_reference": relative(comparison, point),
        "comparable": point.comparable,
        "group": point.group,
        "family": q.family,
        "scheme": q.scheme or None,
        "arithmetic": q.arithmetic if q.known and not record.is_reference else None,
        "file_bpw": q.file_bpw,
        "weight_bytes": q.weight_bytes,
        "engine": q.engine or None,
        "engine_version": q.engine_version or None,
        "kernel": q.kernel,
        "dtype": q.dtype or None,
        "device": q.device or None,
        "revision": q.revision or None,
        "scoring": q.scoring or None,
        **record.extra(),
        "protocol": protocol.name or None,
        "eval_len": protocol.eval_len,
        "stride": protocol.stride,
        "windows": protocol.windows,
        "scored_tokens": protocol.scored_tokens,
        "tokens_sha256": protocol.tokens_sha256,
        "text": protocol.text or None,
        "tokenizer": protocol.tokenizer or None,
        "model": record.model or None,
        "date": record.date,
        "file": str(record.file),
        "notes": list(q.notes),
    }


def relative(comparison: Comparison, point: Point) -> float | None:
    """value / reference - 1; None without a reference, for the reference itself, and for points kept apart."""
    reference = comparison.reference
    if reference is None or point is reference or not point.comparable or point.y is None or not reference.y:
        return None
    return point.y / reference.y - 1


@dataclass(frozen=True)
class Column:
    """A column for readers: its heading, its text for a point, and whether a table without any such text needs it."""

    heading: str
    text: Callable[[Comparison, Point], str]
    right: bool = True
    always: bool = False


def _figure(value: float | None, digits: str) -> str:
    return "–" if value is None else format(value, digits)


def metric_text(value: float | None, stderr: float | None = None) -> str:
    """``25.0648 ± 0.87``: four decimals (four digits where they would vanish), the error to two digits."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4g}"
    return text if stderr is None else f"{text} ± {_two_digits(stderr)}"


def _two_digits(value: float) -> str:
    if value < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _relative_text(comparison: Comparison, point: Point) -> str:
    change = relative(comparison, point)
    if change is None:
        return ""
    return f"{change:+.2%}" if abs(change) < 10 else f"×{change + 1:.4g}"


def _kernel_text(_: Comparison, point: Point) -> str:
    q = point.record.quantization
    told = f"{q.kernel or ''} (weight-only)" if q.runs_other_than_named else q.kernel or ""
    return told.strip()


COLUMNS: tuple[Column, ...] = (
    Column("Model", lambda c, p: p.record.label, right=False, always=True),
    Column("Family", lambda c, p: p.record.quantization.family, right=False, always=True),
    Column("Scheme", lambda c, p: p.record.quantization.scheme, right=False),
    Column("bpw", lambda c, p: _figure(p.record.quantization.layer_bpw, ".3f"), always=True),
    Column("Head bpw", lambda c, p: _figure(p.record.quantization.head_bpw, ".2f"), always=True),
    Column("VRAM GB", lambda c, p: _figure(p.record.quantization.vram_gb, ".3f"), always=True),
    Column("", lambda c, p: _axis_text(c, p)),
    Column("Metric", lambda c, p: metric_text(p.y, p.stderr), always=True),
    Column("vs. ref.", _relative_text),
    Column("Engine", lambda c, p: p.record.quantization.engine, right=False),
    Column("Kernel", _kernel_text, right=False),
)


def _axis_text(comparison: Comparison, point: Point) -> str:
    """The axis asked for, where the other columns do not show it."""
    if comparison.axis.key == "file_bpw":
        return _figure(point.record.quantization.file_bpw, ".3f")
    size = point.record.quantization.weight_bytes
    return _figure(None if size is None else size / GIB, ".3f") if comparison.axis.key == "size" else ""


def _heading(column: Column, comparison: Comparison) -> str:
    names = {
        "Metric": comparison.metric.name,
        "": {"file_bpw": "File bpw", "size": "Size GB"}.get(comparison.axis.key, ""),
    }
    return names.get(column.heading, column.heading)


@dataclass(frozen=True)
class Section:
    """Rows that compare with one another, as texts, and what they were scored on."""

    caption: str
    headings: list[str]
    right: list[bool]
    rows: list[list[str]]


def sections(comparison: Comparison) -> Iterator[Section]:
    """The comparison first, then each group that stands apart."""
    groups = sorted({point.group for point in comparison.points})
    for group in groups:
        points = [point for point in comparison.points if point.group == group]
        texts = [[column.text(comparison, point) for column in COLUMNS] for point in points]
        used = [c.always or any(line[i] for line in texts) for i, c in enumerate(COLUMNS)]
        columns = [column for column, keep in zip(COLUMNS, used, strict=True) if keep]
        yield Section(
            caption=_caption(comparison, points[0]),
            headings=[_heading(column, comparison) for column in columns],
            right=[column.right for column in columns],
            rows=[[cell for cell, keep in zip(line, used, strict=True) if keep] for line in texts],
        )


def _caption(comparison: Comparison, point: Point) -> str:
    protocol = point.record.protocol
    parts = [comparison.metric.task, protocol.text, protocol.describe()]
    if protocol.scored_tokens:
        parts.append(f"{protocol.scored_tokens:,} tokens scored")
    if point.comparable and comparison.reference is not None:
        parts.append(f"ref. = {comparison.reference.record.label}")
    about = ", ".join(part for part in parts if part)
    return about if point.comparable else f"Not comparable with the above: {about}"


def render_json(comparison: Comparison, title: str | None = None) -> str:
    records = [row(comparison, point) for point in comparison.points]
    return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render_csv(comparison: Comparison, title: str | None = None) -> str:
    records = [row(comparison, point) for point in comparison.points]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        record["notes"] = "; ".join(record["notes"])
        writer.writerow({k: csv_cell(v) if isinstance(v, str) else v for k, v in record.items()})
    return stream.getvalue()


def render_markdown(comparison: Comparison, title: str | None = None) -> str:
    lines = [f"### {markdown(title)}", ""] if title else []
    for section in sections(comparison):
        lines += [markdown(section.caption), ""]
        lines.append(f"| {' | '.join(map(markdown, section.headings))} |")
        lines.append(f"|{'|'.join('---:' if right else '---' for right in section.right)}|")
        lines += [f"| {' | '.join(map(markdown, cells))} |" for cells in section.rows]
        lines.append("")
    return "\n".join(lines)


def print_terminal(comparison: Comparison, title: str | None = None, stream: IO[str] | None = None) -> None:
    """Write the terminal table to `stream` (standard output), as wide as the terminal or, elsewhere, as needed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    console = Console(file=stream, highlight=False, markup=False, emoji=False, width=None if narrow else 240)
    if title:
        console.print(Text(title, style="bold"))
    for section in sections(comparison):
        console.print(Text(section.caption, style="dim" if section.caption.startswith("Not") else ""))
        if len(section.rows) > _MANY_ROWS:
            stream.write(_plain(section))
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading, right in zip(section.headings, section.right, strict=True):
            essential = heading in ("Model", comparison.metric.name)
            table.add_column(Text(heading), justify="right" if right else "left", no_wrap=right, overflow="fold",
                             min_width=14 if essential and not right else None)  # fmt: skip
        for cells in section.rows:
            table.add_row(*(Text(shorten(cell, _MAX_LABEL)) for cell in cells))
        console.print(table)
        console.print()


def _plain(section: Section) -> str:
    """Columns of blanks, no styling: rich takes a millisecond a row, which thousands of rows feel."""
    from rich.cells import cell_len

    lines = [section.headings, *([shorten(cell, _MAX_LABEL) for cell in cells] for cells in section.rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(section.headings))]
    text = []
    for line in lines:
        cells = []
        for cell, width, right in zip(line, widths, section.right, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if right else cell + blanks)
        text.append("   ".join(cells).rstrip() + "\n")
    return "".join([*text, "\n"])


def render_terminal(comparison: Comparison, title: str | None = None) -> str:
    stream = io.StringIO()
    print_terminal(comparison, title, stream)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


RENDERERS: dict[str, Callable[[Comparison, str | None], str]] = {
    "terminal": render_terminal,
    "md": render_markdown,
    "csv": render_csv,
    "json": render_json,
}
