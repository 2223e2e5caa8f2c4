"""Every model of a comparison against a baseline, paired by window or document: ``compare table --versus LABEL``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.labels import find_label
from compare.comparison.point import Point
from compare.comparison.significance import MIN_BLOCKS, PairedDifference, blocks_of, bootstrap, holm, mcnemar
from compare.division import ceil_div
from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import formula_of
from compare.results.records import Record
from compare.results.samples import NoSamples, Samples, read_samples
from compare.results.values import integer, mapping

ALPHA = 0.05


@dataclass(frozen=True)
class Pair:
    """A model against the baseline: their difference, or the reason why there is none.

    p_holm: the p-value, corrected for all pairs of the comparison. is_baseline: the model is the baseline itself.
    """

    difference: PairedDifference | None = None
    p_holm: float | None = None
    reason: str = ""
    is_baseline: bool = False

    @property
    def separated(self) -> bool | None:
        """Whether the data separate the two models; None where they are too few to tell."""
        return None if self.p_holm is None else self.p_holm < ALPHA


@dataclass
class Pairs:
    """The pairs of a comparison, by `id` of their point. label: the baseline's. about: how they were formed."""

    label: str
    pairs: dict[int, Pair] = field(default_factory=dict)
    about: str = ""

    def pair(self, point: Point) -> Pair:
        return self.pairs[id(point)]

    @property
    def formed(self) -> bool:
        return any(pair.difference is not None for pair in self.pairs.values())


def measure_pairs(points: Sequence[Point], metric: ChosenMetric, label: str) -> Pairs:
    """Pairs every model with the baseline called `label`. Raises CompareError if there is none."""
    if metric.averaged:
        raise CompareError("--versus pairs the documents of a task, so it cannot be combined with --mean: leave it out")
    baseline = _point_labelled(points, metric, label)
    samples = _CheckedSamples(metric.key)
    pairs: dict[int, Pair] = {}
    for point in points:
        if point is baseline:
            pairs[id(point)] = Pair(is_baseline=True)
            continue
        try:
            pairs[id(point)] = Pair(_difference(point.record, baseline.record, metric, samples))
        except NoSamples as error:
            pairs[id(point)] = Pair(reason=str(error))
    p_values = {
        key: pair.difference.p
        for key, pair in pairs.items()
        if pair.difference is not None and pair.difference.p is not None
    }
    for key, p in zip(p_values, holm(list(p_values.values())), strict=True):
        pairs[key] = replace(pairs[key], p_holm=p)
    return Pairs(baseline.record.label, pairs, _about(baseline.record.label, list(pairs.values())))


def _point_labelled(points: Sequence[Point], metric: ChosenMetric, label: str) -> Point:
    """The point with this label, or the only one whose label contains it. Raises CompareError otherwise."""
    found = find_label([point.record.label for point in points], label, "--versus", f" of {metric.label}")
    return next(point for point in points if point.record.label == found)


class _CheckedSamples:
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


def _difference(record: Record, baseline: Record, metric: ChosenMetric, samples: _CheckedSamples) -> PairedDifference:
    """`record` − `baseline`. Raises NoSamples where there is no pair."""
    if record.comparability(metric.metric) != baseline.comparability(metric.metric):
        raise NoSamples(
            f"not comparable: {record.scored_on(metric.metric)}; {baseline.label}: {baseline.scored_on(metric.metric)}"
        )
    ours, theirs = samples.of(record), samples.of(baseline)
    _check_same(ours, theirs)
    rows = [(unit.total, unit.count) for unit in ours.units.values()]
    others = [(unit.total, unit.count) for unit in theirs.units.values()]
    if ours.zero_or_one and theirs.zero_or_one:
        return mcnemar([total for total, _ in rows], [total for total, _ in others])
    block = 1
    if ours.windows:
        block = _block_windows(record)
        if block != _block_windows(baseline):
            raise NoSamples(f"blocks of {block} windows, but {_block_windows(baseline)} for {baseline.label}")
    formula = formula_of(metric.metric, ours.rolling)
    try:
        difference = bootstrap(blocks_of(rows, block), blocks_of(others, block), formula)
    except ValueError as error:
        raise NoSamples(f"the difference {error}") from None
    kind = f"blocks of {block} windows" if ours.windows else "documents"
    return replace(difference, method=f"paired bootstrap over {difference.units:,} {kind}")


def _check_same(ours: Samples, theirs: Samples) -> None:
    """Raises NoSamples naming the first window or document that differs between the two."""
    name = "window" if ours.windows else "document"
    if ours.windows != theirs.windows or ours.rolling != theirs.rolling:
        raise NoSamples("the samples of the two have different forms")
    if ours.units.keys() != theirs.units.keys():
        task, index = min(ours.units.keys() ^ theirs.units.keys())
        raise NoSamples(
            f"other {name}s: {len(ours.units):,} against {len(theirs.units):,}; {name} {index} of {task} is only in one"
        )
    differing = [key for key, unit in ours.units.items() if unit.identity != theirs.units[key].identity]
    if differing:
        key = differing[0]
        own, other = ours.units[key].identity, theirs.units[key].identity
        part = next((a[0] for a, b in zip(own, other, strict=False) if a != b), "content")
        raise NoSamples(f"other {name}s: {len(differing):,} differ, {name} {key[1]} of {key[0]} the first (its {part})")


def _block_windows(record: Record) -> int:
    """Windows per block, as in the task's own standard error: ceil(eval_len / stride)."""
    windows = integer(mapping(dict(record.run.metadata), "standard_error").get("block_windows"))
    protocol = record.protocol
    if not windows and protocol.eval_len and protocol.stride:
        windows = ceil_div(protocol.eval_len, protocol.stride)
    if not windows:
        raise NoSamples(f"{record.file} does not say how far its windows overlap (standard_error.block_windows)")
    return windows


def _about(label: str, pairs: list[Pair]) -> str:
    """How the figures were formed: the note below the table."""
    methods = {p.difference.method.partition(",")[0]: p.difference for p in pairs if p.difference is not None}
    tested = sum(pair.p_holm is not None for pair in pairs)
    if not tested:
        return f"Δ is model − {label}. Fewer than {MIN_BLOCKS} blocks of windows, or documents, allow no verdict."
    how = "; ".join(
        f"{method}, t at {difference.units - 1} degrees of freedom" if "bootstrap" in method else f"{method} test"
        for method, difference in methods.items()
        if difference.p is not None
    )
    return (
        f"Δ is model − {label}, in pairs ({how}). The 95 % intervals are each pair's own; p is corrected for the "
        f"{tested} pairs of this table (Holm). ≈: not told apart (p ≥ {ALPHA:g})."
    )


def check_formed(label: str, comparisons: Sequence[Pairs]) -> None:
    """Raises CompareError with the first reason if no pair at all could be formed."""
    if any(pairs.formed for pairs in comparisons):
        return
    reasons = [pair.reason for pairs in comparisons for pair in pairs.pairs.values() if pair.reason]
    reason = reasons[0] if reasons else "there is no other model"
    raise CompareError(f"--versus {label}: no pair can be formed: {reason}", NOTHING_USABLE)
