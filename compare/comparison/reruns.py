"""One record a model and task: re-runs settled, labels made unique."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

from compare.results.records import Record


def newest(records: list[Record]) -> tuple[list[Record], list[str]]:
    """The latest record of each identity, in the order first met, and a line for each one it replaces."""
    latest: dict[tuple[str, ...], Record] = {}
    notices: list[str] = []
    for record in records:
        other = latest.setdefault(record.identity, record)
        if other is record:
            continue
        old, new = sorted((other, record), key=lambda r: (r.date, str(r.file)))
        latest[record.identity] = new
        changed = "" if old.protocol.fingerprint == new.protocol.fingerprint else _changed(old, new)
        changed += _other_reference(old, new)
        notices.append(
            f"re-run: {new.label}, {new.task}: {new.file} ({_day(new)}) replaces {old.file} ({_day(old)}){changed}"
        )
    return list(latest.values()), notices


def _changed(old: Record, new: Record) -> str:
    before, after = old.protocol.describe(), new.protocol.describe()
    return f"; other tokens: {after or 'settings unknown'}, before {before or 'unknown'}"


def _other_reference(old: Record, new: Record) -> str:
    if old.divergence is None or old.divergence.reference.id == (
        new.divergence.reference.id if new.divergence is not None else ""
    ):
        return ""
    after = new.divergence.reference.describe() if new.divergence is not None else "none"
    return f"; other reference: {after}, before {old.divergence.reference.describe()}"


def _day(record: Record) -> str:
    try:
        return datetime.fromtimestamp(record.date, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return "date unknown"


# What may tell two models of one label apart, the most telling first.
_DISTINCTIONS: tuple[Callable[[Record], str], ...] = (
    lambda r: r.checkpoint,
    lambda r: r.quantization.scheme,
    lambda r: r.quantization.arithmetic,
    lambda r: r.quantization.engine or r.model,
)


def distinct_labels(records: list[Record], across_tasks: bool = False) -> list[Record]:
    """Records of one task that share a label get what tells them apart added: ``"Q4_K_M (llama.cpp)"``.

    across_tasks: records of any task, so that a model has one label in all of them.
    """
    homonyms: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        homonyms["" if across_tasks else record.task, record.label].append(record)
    renamed: dict[int, Record] = {}
    for group in homonyms.values():
        if len(group) > 1:
            telling = [d for d in _DISTINCTIONS if len({d(r) for r in group}) > 1]
            for record in group:
                added = ", ".join(filter(None, (d(record) for d in telling)))
                renamed[id(record)] = replace(record, label=f"{record.label} ({added})" if added else record.label)
    return [renamed.get(id(record), record) for record in records]
