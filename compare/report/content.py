"""The sections of the report, as markup. Every text that a result file holds goes through `escape`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.families import FULL_PRECISION, family_order, family_style
from compare.report.family_notes import FAMILY_NOTES
from compare.report.pictures import colour_variable
from compare.results.provenance import command
from compare.results.records import Record
from compare.table.columns import Section, sections
from compare.text import show_controls


def heading(about: str, title: str, links: Sequence[tuple[str, str]]) -> str:
    """Title, what was scored, links to the sections."""
    anchors = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    return (
        f'<header><!--theme--><h1>{escape(title)}</h1><p class="soft">{escape(about)}</p><nav>{anchors}</nav></header>'
    )


def verdict(comparison: Comparison, alone: bool = True) -> str:
    """The best model within the budget, and what cannot be told; empty without a budget."""
    found = comparison.verdict
    if found is None:
        return ""
    headline, *rest = found.lines(comparison.metric)
    headline = _capital(headline) if alone else f"{comparison.metric.label}: {headline}"
    if found.best is not None:
        rest.append("Activations and the engine's buffers come on top of weights and cache.")
    said = "".join(f"<p>{escape(_capital(line))}</p>" for line in rest)
    return f'<section class="verdict"><p class="lead">{escape(headline)}</p>{said}</section>'


def tables(comparison: Comparison) -> str:
    """A sortable table for each group of results that compare with one another."""
    return "".join(_table(comparison, section) for section in sections(comparison))


def _table(comparison: Comparison, section: Section) -> str:
    heads = []
    for name, column in zip(section.headings, section.columns, strict=True):
        best_first = column.heading == "Metric" and comparison.metric.higher_is_better
        first = ' data-first="descending"' if best_first else ""
        right = ' class="right"' if column.right else ""
        heads.append(f'<th scope="col"{right}{first}><button type="button">{escape(name)}</button></th>')
    best = comparison.verdict.best if comparison.verdict is not None else None
    rows = []
    for cells, point in zip(section.rows, section.points, strict=True):
        cell_markup = []
        for text, column in zip(cells, section.columns, strict=True):
            if column.number is None:
                cell_markup.append(f"<td>{escape(text)}</td>")
            else:
                number = column.number(comparison, point)
                cell_markup.append(
                    f'<td class="right" data-v="{"" if number is None else repr(number)}">{escape(text)}</td>'
                )
        colour = colour_variable(family_style(point.record.quantization.family).light)
        label = f'<th scope="row"><i style="background: {colour}"></i>{escape(cells[0])}</th>'
        mark = ' class="best"' if point is best else ""
        rows.append(f"<tr{mark}>{label}{''.join(cell_markup[1:])}</tr>")
    return (
        f'<p class="caption">{escape(section.caption)}</p><div class="scroll"><table class="sortable">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def settings(comparison: Comparison) -> str:
    """What every comparable number is over."""
    protocol, averaged = comparison.protocol, comparison.metric.averaged
    run = next(p for p in [*(p for p in comparison.points if p.comparable), *comparison.points]).record.run
    rows = [
        ("Task", comparison.metric.task),
        ("Metric", f"{comparison.metric.short}{_direction(comparison)}"),
        ("Mean over", "; ".join(protocol.harness) if averaged else ""),
        ("Protocol", protocol.name),
        ("Windows", f"{protocol.windows:,}" if protocol.windows else ""),
        ("Tokens a window", f"{protocol.eval_len:,}" if protocol.eval_len else ""),
        ("Stride", f"{protocol.stride:,}" if protocol.stride else ""),
        ("Scored tokens", f"{protocol.scored_tokens:,}" if protocol.scored_tokens else ""),
        ("Text", protocol.text),
        ("Tokens fingerprint", f"{protocol.tokens_sha256} (SHA-256)" if protocol.tokens_sha256 else ""),
        ("Tokenizer", protocol.tokenizer),
        *((_NAMES.get(key, key), _plain(value)) for key, value in run.about_text.items()),
        ("Task version, samples, shots", "" if protocol.name or averaged else ", ".join(protocol.harness)),
        ("Harness", f"lm-evaluation-harness {run.harness_version}" if run.harness_version else ""),
    ]
    return pairs([(name, text) for name, text in rows if text])


_NAMES = {
    "text_sha256": "Text fingerprint (SHA-256)",
    "bos_applied": "BOS",
    "blank_rows": "Blank rows of the data set",
    "warmup_tokens": "Warm-up tokens a window",
    "distinct_tokens": "Distinct tokens",
    "nonfinite_logprobs": "Log-probabilities that were not finite",
}


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _direction(comparison: Comparison) -> str:
    return {True: ", higher is better", False: ", lower is better", None: ""}[comparison.metric.higher_is_better]


def families(comparisons: Sequence[Comparison]) -> str:
    """A note on each family that is there."""
    present = sorted({p.record.quantization.family for c in comparisons for p in c.points}, key=family_order)
    rows = [(name, FAMILY_NOTES[name]) for name in present if name in FAMILY_NOTES]
    return pairs(
        [*(r for r in rows if r[0] != FULL_PRECISION), *(r for r in rows if r[0] == FULL_PRECISION)], "families"
    )


def runs(comparisons: Sequence[Comparison]) -> str:
    """For each row the command that repeats it, what it ran on, and the notes of its file."""
    found: dict[tuple[str, str, str], str] = {}
    for comparison in comparisons:
        for point in comparison.points:
            for record, tasks in _runs_of(point):
                found.setdefault((record.label, str(record.file), tasks), _run(record, tasks))
    return "".join(found.values())


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


def _run(record: Record, tasks: str) -> str:
    q = record.quantization
    said = command(record.run, tasks)
    if said is None:
        code = "<p>Its result file does not name the model it ran.</p>"
    else:
        code = f"<pre><code>{escape(show_controls(said))}</code></pre>"
    notes = list(q.notes)
    warning = ""
    if record.run.runs_foreign_code:
        warning = (
            '<p class="warn">This command lets code that comes with the checkpoint or task run on your machine.</p>'
        )
    if said is not None and show_controls(said) != said:
        warning += (
            '<p class="warn">Characters that cannot be shown stand here as escapes; the command is not exact.</p>'
        )
    ran_on = ", ".join(filter(None, (
        " ".join(filter(None, (q.engine, q.engine_version))), f"kernel {q.kernel}" if q.kernel else "", q.dtype,
        q.device, f"revision {q.revision}" if q.revision else "",
        f"lm_eval {record.run.harness_version}" if record.run.harness_version else "",
        f"transformers {record.run.transformers_version}" if record.run.transformers_version else "",
    )))  # fmt: skip
    copy = '<button type="button" class="copy">Copy</button>' if said is not None else ""
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<article class="run"><header><h3>{escape(record.label)}</h3>{copy}</header>{code}{warning}'
        f"<p>{escape(show_controls(ran_on))}</p>{f'<ul>{listed}</ul>' if listed else ''}</article>"
    )


def notices(lines: Sequence[str]) -> str:
    """What was skipped, replaced, left out or kept apart."""
    return f'<ul class="notices">{"".join(f"<li>{escape(show_controls(line))}</li>" for line in lines)}</ul>'


def pairs(rows: Sequence[tuple[str, str]], kind: str = "") -> str:
    """Names and what is said of each."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(show_controls(text))}</dd>" for name, text in rows)
    return f'<dl class="pairs {kind}">{items}</dl>'


def section(name: str, title: str, body: str) -> Iterator[str]:
    """A section with its heading; none where there is nothing to say."""
    if body:
        yield f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
