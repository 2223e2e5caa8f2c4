"""The table of ``compare attribute``: parts by their cost."""

from __future__ import annotations

import csv
import io

from compare.comparison.attribution import Ranked, ranked, summary
from compare.results.attribution import Attribution
from compare.text import csv_cell, markdown

_HEADINGS = ("Part", "Weights", "KL divergence (nats)", "Share", "Per weight (average = 1)")


def render_markdown(attribution: Attribution, top: int | None = None) -> str:
    """The `top` most expensive parts; the rest is one row."""
    rows = ranked(attribution)
    shown = rows if top is None else rows[:top]
    a = attribution
    windows = f"{a.windows:,} windows, " if a.windows else ""
    tokens = f"{a.scored_tokens:,} tokens scored, " if a.scored_tokens else ""
    heading = f"{a.quantized} one {a.by} at a time, in {a.original}: {a.task}, {windows}{tokens}reference {a.reference}"
    lines = [markdown(heading), "", f"| {' | '.join(_HEADINGS)} |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(map(markdown, _cells(row)))} |" for row in shown]
    rest = rows[len(shown) :]
    if rest:
        share = None if any(r.share is None for r in rest) else sum(r.share or 0.0 for r in rest)
        lines.append(f"| {len(rest)} others | | {sum(r.cost for r in rest):.4g} | {_percent(share)} | |")
    for sentence in summary(attribution):
        lines += ["", markdown(sentence)]
    return "\n".join(lines) + "\n"


def _cells(row: Ranked) -> tuple[str, ...]:
    error = "" if row.part.stderr is None else f" ± {row.part.stderr:.2g}"
    return (
        row.part.name,
        "–" if row.part.weights is None else f"{row.part.weights:,}",
        f"{row.cost:.4g}{error}",
        _percent(row.share),
        "–" if row.density is None else f"{row.density:.2f}",
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def render_csv(attribution: Attribution) -> str:
    """All parts, at full precision."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("part", "layer", "kind", "weights", "cost", "stderr", "share", "per_weight"))
    for row in ranked(attribution):
        p = row.part
        writer.writerow(
            (csv_cell(p.name), p.layer, csv_cell(p.kind), p.weights, row.cost, p.stderr, row.share, row.density)
        )
    return stream.getvalue()
