"""The table as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from compare.comparison.comparison import Comparison
from compare.table.columns import sections
from compare.table.rows import row
from compare.text import csv_cell, markdown


def render_json(comparisons: Sequence[Comparison], title: str | None = None) -> str:
    """A list with one object per model and metric; JSON has no place for a title."""
    return json.dumps(_records(comparisons), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [row(comparison, point) for comparison in comparisons for point in comparison.points]


def render_csv(comparisons: Sequence[Comparison], title: str | None = None) -> str:
    """One line per model and metric; each task of a mean has its own column."""
    records = _records(comparisons)
    for record in records:
        for name in ("notes", "not_numbers", "caveats"):
            record[name] = "; ".join(record[name])
        for label, figure in record.pop("tasks", {}).items():
            record |= {label: figure["value"], f"{label} stderr": figure["stderr"]}
        if "averaged" in record:
            record["averaged"] = "; ".join(record["averaged"])
    fields = list(dict.fromkeys(name for record in records for name in record))  # fields differ between metrics
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: csv_cell(v) if isinstance(v, str) else v for k, v in record.items()})
    return stream.getvalue()


def render_markdown(comparisons: Sequence[Comparison], title: str | None = None) -> str:
    """One table per section, with its caption and note."""
    lines = [f"### {markdown(title)}", ""] if title else []
    for section in (section for comparison in comparisons for section in sections(comparison)):
        lines += [markdown(section.caption), ""]
        lines.append(f"| {' | '.join(map(markdown, section.headings))} |")
        lines.append(f"|{'|'.join('---:' if right else '---' for right in section.right)}|")
        lines += [f"| {' | '.join(map(markdown, cells))} |" for cells in section.rows]
        if section.note:
            lines += [text for line in section.note.splitlines() for text in ("", markdown(line))]
        lines.append("")
    return "\n".join(lines)
