"""Hashes of the scored prompts, which a result file has only with --log_samples.

Results with the same settings and different hashes were scored on different prompts. A result without a hash is
compared with those that have one, unless these contradict each other: then its prompts are unknown.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from compare.results.records import ProtocolRecord, Record


def settle_hashes(records: list[Record]) -> list[Record]:
    """The records, without the hash where all with the same settings agree; unknown where one is missing and others
    differ."""
    hashes: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for record in records:
        hashes[_settings(record)].add(record.protocol.task_hash)
    return [replace(r, protocol=_settled(r.protocol, hashes[_settings(r)])) for r in records]


def _settings(record: Record) -> tuple[object, ...]:
    protocol = record.protocol
    return (record.task, protocol.fingerprint, protocol.configuration, protocol.unknown)


def _settled(protocol: ProtocolRecord, hashes: set[str]) -> ProtocolRecord:
    if protocol.has_windows or len(hashes - {""}) < 2:
        return replace(protocol, task_hash="")
    return protocol if protocol.task_hash else replace(protocol, unknown=(*protocol.unknown, "task hash"))
