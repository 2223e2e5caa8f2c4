"""One record per model and task: the latest re-run counts, and labels become unique."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

from compare.results.records import Record


def newest(records: list[Record]) -> tuple[list[Record], list[str]]:
    """The latest record of each identity, in the order of first occurrence, and a line for each replaced one."""
    latest: dict[tuple[str, ...], Record] = {}
    notices: list[str] = []
    for record in records:
        other = latest.setdefault(record.identity, record)
        if other is record:
            continue
        old, new = sorted((other, record), key=lambda r: (r.date, str(r.file)))
        latest[record.identity] = new
        changed = "" if old.protocol.fingerprint == new.protocol.fingerprint else _token_change(old, new)
        changed += _reference_change(old, new)
        notices.append(
            f"re-run: {new.label}, {new.task}: {new.file} ({_day(new)}) replaces {old.file} ({_day(old)}){changed}"
        )
    return list(latest.values()), notices


def _token_change(old: Record, new: Record) -> str:
    before, after = old.protocol.describe(), new.protocol.describe()
    return f"; other tokens: {after or 'settings unknown'}, before {before or 'unknown'}"


def _reference_change(old: Record, new: Record) -> str:
    new_id = new.divergence.reference.id if new.divergence is not None else ""
    if old.divergence is None or old.divergence.reference.id == new_id:
        return ""
    after = new.divergence.reference.describe() if new.divergence is not None else "none"
    return f"; other reference: {after}, before {old.divergence.reference.describe()}"


def _day(record: Record) -> str:
    try:
        return datetime.fromtimestamp(record.date, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return "date unknown"


# Properties that distinguish models with the same label, the most informative first.
_DISTINCTIONS: tuple[Callable[[Record], str], ...] = (
    lambda r: r.checkpoint,
    lambda r: r.quantization.scheme,
    lambda r: r.quantization.arithmetic,
    lambda r: r.quantization.engine or r.model,
)


def distinct_labels(records: list[Record], across_tasks: bool = False) -> list[Record]:
    """Adds what distinguishes them to the labels of records that share one: ``"Q4_K_M (llama.cpp)"``.

    Labels are unique within a task; with across_tasks over all tasks, so that a model has the same label in each.
    """
    homonyms: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        homonyms["" if across_tasks else record.task, record.label].append(record)
    renamed: dict[int, Record] = {}
    for group in homonyms.values():
        if len(group) > 1:
            distinctions = [d for d in _DISTINCTIONS if len({d(r) for r in group}) > 1]
            for record in group:
                added = ", ".join(filter(None, (d(record) for d in distinctions)))
                renamed[id(record)] = replace(record, label=f"{record.label} ({added})" if added else record.label)
    return [renamed.get(id(record), record) for record in records]
