"""One record per model and task: the latest re-run counts, and labels become unique."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

from compare.results.records import Record


def newest(records: list[Record], across_settings: bool = False) -> tuple[list[Record], list[str]]:
    """The latest record of each identity, in the order of first occurrence, and a line for each replaced one.

    Runs of a harness task with different settings (shots, limit …) are not re-runs of each other, unless
    across_settings, as a mean needs: one record per model and task.
    """
    latest: dict[tuple[object, ...], Record] = {}
    notices: list[str] = []
    for record in records:
        key = (record.identity, () if across_settings else _settings(record))
        other = latest.setdefault(key, record)
        if other is record:
            continue
        old, new = sorted((other, record), key=lambda r: (r.date, str(r.file)))
        latest[key] = new
        changed = _change(old, new) + _reference_change(old, new)
        notices.append(
            f"re-run: {new.label}, {new.task}: {new.file} ({_day(new)}) replaces {old.file} ({_day(old)}){changed}"
        )
    return list(latest.values()), notices


def _settings(record: Record) -> tuple[str, ...]:
    protocol = record.protocol
    return () if protocol.has_windows else (*protocol.harness, protocol.configuration)


def _change(old: Record, new: Record) -> str:
    """What the newer run was scored on, where that differs; empty where it does not."""
    before, after = old.protocol, new.protocol
    if before.fingerprint == after.fingerprint and _settings(old) == _settings(new):
        return ""
    if before.has_windows or after.has_windows:
        return f"; other tokens: {after.describe() or 'settings unknown'}, before {before.describe() or 'unknown'}"
    return f"; other settings: {', '.join(_settings(new))}; before: {', '.join(_settings(old))}"


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
            added = [", ".join(filter(None, (d(record) for d in distinctions))) for record in group]
            for more in (_different_arguments, _different_settings):
                if len(set(zip(added, (record.task for record in group), strict=True))) < len(group):
                    added = [", ".join(filter(None, parts)) for parts in zip(added, more(group), strict=True)]
            for record, text in zip(group, added, strict=True):
                renamed[id(record)] = replace(record, label=f"{record.label} ({text})" if text else record.label)
    return [renamed.get(id(record), record) for record in records]


def _different_arguments(group: list[Record]) -> list[str]:
    """Per record, the model arguments that not all have alike; paths by the parts that differ."""
    arguments = [dict(record.chosen_by) for record in group]
    names = sorted({name for own in arguments for name in own})
    texts: list[list[str]] = [[] for _ in group]
    for name in names:
        values = [own.get(name, "") for own in arguments]
        if len(set(values)) > 1:
            for text, value, short in zip(texts, values, _without_common_start(values), strict=True):
                if value:
                    text.append(short if "/" in value else f"{name}={value}")
    return [", ".join(text) for text in texts]


def _without_common_start(paths: list[str]) -> list[str]:
    """Paths without the folders that all of them begin with."""
    parts = [path.split("/") for path in paths]
    common = 0
    while all(len(own) > common + 1 for own in parts) and len({own[common] for own in parts}) == 1:
        common += 1
    return ["/".join(own[common:]) for own in parts]


def _different_settings(group: list[Record]) -> list[str]:
    """Per record of a harness task, the settings that not all have."""
    settings = [record.protocol.harness for record in group]
    shared = set(settings[0]).intersection(*settings)
    return [", ".join(setting for setting in own if setting not in shared) for own in settings]
