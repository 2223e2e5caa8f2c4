"""The table as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json

from compare.comparison import Comparison
from compare.table.columns import sections
from compare.table.rows import row
from compare.text import csv_cell, markdown


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
