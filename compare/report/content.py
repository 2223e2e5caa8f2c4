"""What the sections of the report hold, as plain text; the templates escape it and give it its markup."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.families import FULL_PRECISION, family_order, family_style
from compare.report.family_notes import FAMILY_NOTES
from compare.report.pictures import colour_variable
from compare.results.provenance import command
from compare.results.records import Record
from compare.table.columns import Section, sections
from compare.text import show_controls

Pairs = list[tuple[str, str]]  # names with their descriptions


@dataclass(frozen=True)
class VerdictText:
    """The best model within the budget, and what cannot be decided."""

    headline: str
    lines: list[str]


@dataclass(frozen=True)
class Head:
    """A column heading. right: aligned right; descending_first: the first click sorts from the largest value down."""

    text: str
    right: bool = False
    descending_first: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell's text. sort_key: the number to sort by, empty where it is unknown; None in a column of texts."""

    text: str
    sort_key: str | None = None


@dataclass(frozen=True)
class PageRow:
    """A model's row. colour: a CSS colour, the family's; best: the best model within the budget."""

    label: str
    colour: str
    cells: list[Cell]
    best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A sortable table; the first heading is that of the rows' labels. notes: lines below it."""

    caption: str
    heads: list[Head]
    rows: list[PageRow]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SettingsList:
    """What every comparable number of a metric is over. heading: the metric's label where the page has several."""

    heading: str
    rows: Pairs


@dataclass(frozen=True)
class RunEntry:
    """The command that repeats a row, what it ran on, and the notes of its file."""

    label: str
    command: str | None
    ran_on: str
    notes: list[str] = field(default_factory=list)
    runs_foreign_code: bool = False
    shown_inexactly: bool = False


def verdict(comparison: Comparison, alone: bool = True) -> VerdictText | None:
    """The verdict on the budget; None without a budget. alone: the page has no other metric."""
    budget_verdict = comparison.verdict
    if budget_verdict is None:
        return None
    headline, *rest = budget_verdict.lines(comparison.metric)
    headline = _capital(headline) if alone else f"{comparison.metric.label}: {headline}"
    if budget_verdict.best is not None:
        rest.append("Activations and the engine's buffers come on top of weights and cache.")
    return VerdictText(headline, [_capital(line) for line in rest])


def tables(comparison: Comparison) -> list[PageTable]:
    """One table per group of results that compare with one another."""
    return [_table(comparison, section) for section in sections(comparison)]


def _table(comparison: Comparison, section: Section) -> PageTable:
    heads = [
        Head(name, column.right, column.heading == "Metric" and bool(comparison.metric.higher_is_better))
        for name, column in zip(section.headings, section.columns, strict=True)
    ]
    best = comparison.verdict.best if comparison.verdict is not None else None
    rows = []
    for texts, point in zip(section.rows, section.points, strict=True):
        cells = [
            Cell(text) if column.number is None else Cell(text, sort_key(column.number(comparison, point)))
            for text, column in zip(texts, section.columns, strict=True)
        ]
        rows.append(PageRow(texts[0], family_colour(point), cells[1:], point is best))
    return PageTable(section.caption, heads, rows, section.note.splitlines())


def sort_key(value: float | None) -> str:
    """The number as page.js reads it; empty where it is unknown, which sorts last."""
    return "" if value is None else "Infinity" if value == math.inf else repr(value)


def family_colour(point: Point) -> str:
    """The page's variable of the family's colour."""
    return colour_of_family(point.record.quantization.family)


def colour_of_family(family: str) -> str:
    """The page's variable of a family's colour."""
    return colour_variable(family_style(family).light)


def settings(comparison: Comparison, heading: str) -> SettingsList:
    """What every comparable number is over."""
    protocol, averaged = comparison.protocol, comparison.metric.averaged
    run = next(p for p in [*(p for p in comparison.points if p.comparable), *comparison.points]).record.run
    rows = [
        ("Task", comparison.metric.task),
        ("Metric", f"{comparison.metric.short}{_direction(comparison)}"),
        ("Mean over", "; ".join(protocol.harness) if averaged else ""),
        ("Protocol", protocol.name),
        ("Windows", f"{protocol.windows:,}" if protocol.windows else ""),
        ("Tokens per window", f"{protocol.eval_len:,}" if protocol.eval_len else ""),
        ("Stride", f"{protocol.stride:,}" if protocol.stride else ""),
        ("Scored tokens", f"{protocol.scored_tokens:,}" if protocol.scored_tokens else ""),
        ("Text", protocol.text),
        ("Tokens fingerprint", f"{protocol.tokens_sha256} (SHA-256)" if protocol.tokens_sha256 else ""),
        ("Tokenizer", protocol.tokenizer),
        *((_NAMES.get(key, key), _plain(value)) for key, value in run.about_text.items()),
        ("Task version, samples, shots", "" if protocol.name or averaged else ", ".join(protocol.harness)),
        ("Harness", f"lm-evaluation-harness {run.harness_version}" if run.harness_version else ""),
    ]
    return SettingsList(heading, [(name, show_controls(text)) for name, text in rows if text])


_NAMES = {
    "text_sha256": "Text fingerprint (SHA-256)",
    "bos_applied": "BOS",
    "blank_rows": "Blank rows of the data set",
    "warmup_tokens": "Warm-up tokens per window",
    "distinct_tokens": "Distinct tokens",
    "nonfinite_logprobs": "Log-probabilities that were not finite",
}


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _direction(comparison: Comparison) -> str:
    return {True: ", higher is better", False: ", lower is better", None: ""}[comparison.metric.higher_is_better]


def families(comparisons: Sequence[Comparison]) -> Pairs:
    """A note on each family of the comparisons, full precision last."""
    present = sorted({p.record.quantization.family for c in comparisons for p in c.points}, key=family_order)
    rows = [(name, FAMILY_NOTES[name]) for name in present if name in FAMILY_NOTES]
    return [*(r for r in rows if r[0] != FULL_PRECISION), *(r for r in rows if r[0] == FULL_PRECISION)]


def runs(comparisons: Sequence[Comparison]) -> list[RunEntry]:
    """The runs behind all rows, each once."""
    entries: dict[tuple[str, str, str], RunEntry] = {}
    for comparison in comparisons:
        for point in comparison.points:
            for record, tasks in _runs_of(point):
                entries.setdefault((record.label, str(record.file), tasks), _run(record, tasks))
    return list(entries.values())


def _runs_of(point: Point) -> Iterator[tuple[Record, str]]:
    """The runs behind a point, each with its tasks, comma-separated: one, or those of the parts of a mean."""
    if not point.parts:
        yield point.record, point.record.task
        return
    by_run: dict[tuple[str, int | None], list[Record]] = {}
    for part in point.parts:
        if part.record is not None:
            by_run.setdefault((str(part.record.file), part.record.run.shots), []).append(part.record)
    for records in by_run.values():
        yield records[0], ",".join(dict.fromkeys(record.task for record in records))


def _run(record: Record, tasks: str) -> RunEntry:
    q = record.quantization
    exact = command(record.run, tasks)
    shown = None if exact is None else show_controls(exact)
    ran_on = ", ".join(filter(None, (
        " ".join(filter(None, (q.engine, q.engine_version))), f"kernel {q.kernel}" if q.kernel else "", q.dtype,
        q.device, f"revision {q.revision}" if q.revision else "",
        f"lm_eval {record.run.harness_version}" if record.run.harness_version else "",
        f"transformers {record.run.transformers_version}" if record.run.transformers_version else "",
    )))  # fmt: skip
    return RunEntry(
        label=record.label,
        command=shown,
        ran_on=show_controls(ran_on),
        notes=list(q.notes),
        runs_foreign_code=record.run.runs_foreign_code,
        shown_inexactly=shown != exact,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
