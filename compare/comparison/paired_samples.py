"""The samples of two runs, checked and matched: the same windows, or the documents that both answered."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.significance import blocks_of
from compare.division import ceil_div
from compare.metrics import formula_of
from compare.results.records import Record
from compare.results.samples import NoSamples, Samples, Unit, read_samples
from compare.results.values import integer, mapping

if TYPE_CHECKING:
    from compare.metrics import Array


class CheckedSamples:
    """Reads the samples of each record once, and checks that they add up to the figure of its result file."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._cache: dict[int, Samples | NoSamples] = {}

    def of(self, record: Record) -> Samples:
        """The samples of `record`. Raises NoSamples where they are missing or do not fit its figure."""
        if id(record) not in self._cache:
            try:
                self._cache[id(record)] = self._read(record)
            except NoSamples as error:
                self._cache[id(record)] = error
        samples = self._cache[id(record)]
        if isinstance(samples, NoSamples):
            raise samples
        return samples

    def _read(self, record: Record) -> Samples:
        import numpy as np

        samples = read_samples(record, self._key)
        total = math.fsum(unit.total for unit in samples.units.values())
        count = math.fsum(unit.count for unit in samples.units.values())
        formula = formula_of(self._key.partition(",")[0], samples.rolling)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            computed = float(formula(np.array([total]), np.array([count]))[0])
        stored = record.metric(self._key).value
        if stored is None or not math.isclose(computed, stored, rel_tol=1e-6, abs_tol=1e-9):
            raise NoSamples(
                f"the samples beside {record.file} give {computed:.6g}, but the result file has "
                f"{'no value' if stored is None else f'{stored:.6g}'}: they belong to another run, or the figure is "
                "not a mean over them"
            )
        return samples


@dataclass(frozen=True)
class MatchedSamples:
    """The units that two runs share, as (baseline, model) pairs in order.

    rows, others: [units, 2], sums and counts of the model and of the baseline by independent unit: blocks of `block`
    windows, groups of questions, or single documents. kind: what these units are, in a reader's words. note: documents
    that only one of the two answered, which are in no pair; empty where there are none.
    """

    pairs: list[tuple[Unit, Unit]]
    rows: Array
    others: Array
    windows: bool
    rolling: bool
    block: int
    grouped: bool
    kind: str
    note: str = ""

    @property
    def right_or_wrong(self) -> bool:
        """Whether each unit is a document that is either right or wrong in both runs."""
        whole = not self.windows and not self.rolling
        return whole and all(unit.total in (0.0, 1.0) for pair in self.pairs for unit in pair)

    @property
    def shares(self) -> bool:
        """Whether the figure is a mean of values between 0 and 1."""
        return not self.rolling and all(0 <= unit.total <= unit.count for pair in self.pairs for unit in pair)


def match(record: Record, baseline: Record, metric: ChosenMetric, samples: CheckedSamples) -> MatchedSamples:
    """The units of `record` beside those of `baseline`. Raises NoSamples where they cannot be paired."""
    if record.comparability(metric.metric) != baseline.comparability(metric.metric):
        raise NoSamples(
            f"not comparable: {record.scored_on(metric.metric)}; {baseline.label}: {baseline.scored_on(metric.metric)}"
        )
    ours, theirs = samples.of(record), samples.of(baseline)
    keys = _common(ours, theirs)
    pairs = [(theirs.units[key], ours.units[key]) for key in keys]
    left, right = len(ours.units) - len(keys), len(theirs.units) - len(keys)
    alone = [f"{count:,} only {label}" for count, label in ((left, record.label), (right, baseline.label)) if count]
    note = f"{len(keys):,} documents that both answered ({', '.join(alone)})" if alone else ""
    rows = [(unit.total, unit.count) for _, unit in pairs]
    others = [(unit.total, unit.count) for unit, _ in pairs]
    if ours.windows:
        block = _block_windows(record)
        if block != _block_windows(baseline):
            raise NoSamples(f"blocks of {block} windows, but {_block_windows(baseline)} for {baseline.label}")
        own, other = blocks_of(rows, block), blocks_of(others, block)
        return MatchedSamples(pairs, own, other, True, False, block, False, f"blocks of {block} windows")
    groups = [f"{key[0]}\0{unit.group}" if unit.group else "" for key, (_, unit) in zip(keys, pairs, strict=True)]
    if not any(groups):
        own, other = blocks_of(rows, 1), blocks_of(others, 1)
        return MatchedSamples(pairs, own, other, False, ours.rolling, 1, False, "documents", note)
    # a document without a group is one of its own
    names = [group or f"\0{i}" for i, group in enumerate(groups)]
    own, other = _summed(rows, names), _summed(others, names)
    return MatchedSamples(pairs, own, other, False, ours.rolling, 1, True, "groups of documents", note)


def _summed(rows: list[tuple[float, float]], groups: list[str]) -> Array:
    """[groups, 2]: the sums of the rows of each group."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (total, count), group in zip(rows, groups, strict=True):
        sums[group][0] += total
        sums[group][1] += count
    return blocks_of([(total, count) for total, count in sums.values()], 1)


def _common(ours: Samples, theirs: Samples) -> list[tuple[str, int]]:
    """The units that both have. Raises NoSamples where windows differ, or a document differs in its content."""
    name = "window" if ours.windows else "document"
    if ours.windows != theirs.windows or ours.rolling != theirs.rolling:
        raise NoSamples("the samples of the two have different forms")
    keys = [key for key in theirs.units if key in ours.units]
    if not keys or (ours.windows and ours.units.keys() != theirs.units.keys()):
        task, index = min(ours.units.keys() ^ theirs.units.keys())
        raise NoSamples(
            f"other {name}s: {len(ours.units):,} against {len(theirs.units):,}; {name} {index} of {task} is only in one"
        )
    differing = [key for key in keys if ours.units[key].identity != theirs.units[key].identity]
    if differing:
        key = differing[0]
        own, other = ours.units[key].identity, theirs.units[key].identity
        part = next((a[0] for a, b in zip(own, other, strict=False) if a != b), "content")
        raise NoSamples(f"other {name}s: {len(differing):,} differ, {name} {key[1]} of {key[0]} the first (its {part})")
    return keys


def _block_windows(record: Record) -> int:
    """Windows per block, as in the task's own standard error: ceil(eval_len / stride)."""
    windows = integer(mapping(dict(record.run.metadata), "standard_error").get("block_windows"))
    protocol = record.protocol
    if not windows and protocol.eval_len and protocol.stride:
        windows = ceil_div(protocol.eval_len, protocol.stride)
    if not windows:
        raise NoSamples(f"{record.file} does not say how far its windows overlap (standard_error.block_windows)")
    return windows
