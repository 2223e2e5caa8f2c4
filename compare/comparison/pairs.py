"""Every model of a comparison against one of them, in pairs: ``compare table --versus LABEL``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from compare.comparison.metric_choice import MetricChoice
from compare.comparison.point import Point
from compare.comparison.significance import MIN_BLOCKS, PairedDifference, blocks_of, bootstrap, holm, mcnemar
from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import figure_of
from compare.results.records import Record
from compare.results.samples import NoSamples, Samples, read_samples
from compare.results.values import mapping, whole
from compare.text import and_more

ALPHA = 0.05


@dataclass(frozen=True)
class Pair:
    """A model against the baseline: a verdict, or the reason why there is none.

    `p_holm` is corrected for all pairs of the comparison; `baseline`: the model is the baseline itself.
    """

    verdict: PairedDifference | None = None
    p_holm: float | None = None
    reason: str = ""
    baseline: bool = False

    @property
    def separated(self) -> bool | None:
        """Whether the data tell the two apart; None where they allow no verdict."""
        return None if self.p_holm is None else self.p_holm < ALPHA


@dataclass
class Pairs:
    """The pairs of a comparison, by `id` of their point."""

    label: str
    pairs: dict[int, Pair] = field(default_factory=dict)
    about: str = ""

    def pair(self, point: Point) -> Pair:
        return self.pairs[id(point)]

    @property
    def formed(self) -> bool:
        return any(pair.verdict is not None for pair in self.pairs.values())


def measure(points: Sequence[Point], metric: MetricChoice, label: str) -> Pairs:
    """Pairs every model with the one called `label`. Raises CompareError if there is none."""
    if metric.averaged:
        raise CompareError("--versus pairs the documents of a task; it is not for --mean: name the tasks without it")
    baseline = _find(points, metric, label)
    reader = _Reader(metric.key)
    found: dict[int, Pair] = {}
    for point in points:
        if point is baseline:
            found[id(point)] = Pair(baseline=True)
            continue
        try:
            found[id(point)] = Pair(reader.verdict(point.record, baseline.record))
        except NoSamples as error:
            found[id(point)] = Pair(reason=str(error))
    told = {key: pair.verdict.p for key, pair in found.items() if pair.verdict is not None}
    tested = {key: p for key, p in told.items() if p is not None}
    for key, p in zip(tested, holm(list(tested.values())), strict=True):
        found[key] = replace(found[key], p_holm=p)
    return Pairs(baseline.record.label, found, _about(baseline.record.label, list(found.values())))


def _find(points: Sequence[Point], metric: MetricChoice, label: str) -> Point:
    """The point of this label; of those that hold it, if it is only one."""
    wanted, labels = label.strip().casefold(), [point.record.label for point in points]
    for matches in (
        [p for p in points if p.record.label == label.strip()],
        [p for p in points if p.record.label.casefold() == wanted],
        [p for p in points if wanted and wanted in p.record.label.casefold()],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CompareError(
                f"--versus {label}: several models are called that: {and_more([p.record.label for p in matches])}"
            )
    close = difflib.get_close_matches(label, labels, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"labels: {and_more(sorted(set(labels)), 20)}"
    raise CompareError(f"--versus {label}: no model of {metric.label} is called that; {hint}")


class _Reader:
    """Reads the samples of each record once, and checks that they make the figure of its result file."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._read: dict[int, Samples | NoSamples] = {}

    def verdict(self, record: Record, baseline: Record) -> PairedDifference:
        """`record` less `baseline`. NoSamples says why there is no pair."""
        metric = self._key.partition(",")[0]
        if record.comparability(metric) != baseline.comparability(metric):
            raise NoSamples(f"not over the same: {_over(record, metric)}; {baseline.label}: {_over(baseline, metric)}")
        ours, theirs = self._samples(record), self._samples(baseline)
        _check_same(ours, theirs)
        rows = [(unit.total, unit.count) for unit in ours.units.values()]
        others = [(unit.total, unit.count) for unit in theirs.units.values()]
        if ours.zero_or_one and theirs.zero_or_one:
            return mcnemar([total for total, _ in rows], [total for total, _ in others])
        block = 1
        if ours.windows:
            block = _block(record)
            if block != _block(baseline):
                raise NoSamples(f"blocks of {block} windows, of {baseline.label}'s {_block(baseline)}")
        try:
            found = bootstrap(blocks_of(rows, block), blocks_of(others, block), figure_of(self._key, ours.rolling))
        except ValueError as error:
            raise NoSamples(f"the difference {error}") from None
        kind = f"blocks of {block} windows" if ours.windows else "documents"
        return replace(found, method=f"paired bootstrap over {found.units:,} {kind}")

    def _samples(self, record: Record) -> Samples:
        if id(record) not in self._read:
            try:
                self._read[id(record)] = self._checked(record)
            except NoSamples as error:
                self._read[id(record)] = error
        found = self._read[id(record)]
        if isinstance(found, NoSamples):
            raise found
        return found

    def _checked(self, record: Record) -> Samples:
        import numpy as np

        samples = read_samples(record, self._key)
        total = math.fsum(unit.total for unit in samples.units.values())
        count = math.fsum(unit.count for unit in samples.units.values())
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            made = float(figure_of(self._key, samples.rolling)(np.array([total]), np.array([count]))[0])
        said = record.metric(self._key).value
        if said is None or not math.isclose(made, said, rel_tol=1e-6, abs_tol=1e-9):
            raise NoSamples(
                f"the samples beside {record.file} make {made:.6g}, the result file says "
                f"{'nothing' if said is None else f'{said:.6g}'}: they are of another run, or it is no mean of them"
            )
        return samples


def _over(record: Record, metric: str) -> str:
    protocol = record.protocol
    parts = [protocol.describe() or ", ".join(protocol.fingerprint)]
    if protocol.tokens_sha256:
        parts.append(f"tokens {protocol.tokens_sha256[:8]}")
    if record.comparability(metric) != protocol.fingerprint:
        parts.append(f"reference {record.divergence.reference.describe() if record.divergence else 'not named'}")
    return ", ".join(parts)


def _check_same(ours: Samples, theirs: Samples) -> None:
    """NoSamples names the first window or document that is not the same for both."""
    name = "window" if ours.windows else "document"
    if ours.windows != theirs.windows or ours.rolling != theirs.rolling:
        raise NoSamples("the samples of the two are of different form")
    if ours.units.keys() != theirs.units.keys():
        task, index = min(ours.units.keys() ^ theirs.units.keys())
        raise NoSamples(
            f"other {name}s: {len(ours.units):,} against {len(theirs.units):,}; {name} {index} of {task} is only in one"
        )
    differing = [key for key, unit in ours.units.items() if unit.identity != theirs.units[key].identity]
    if differing:
        key = differing[0]
        own, other = ours.units[key].identity, theirs.units[key].identity
        what = next((a[0] for a, b in zip(own, other, strict=False) if a != b), "content")
        raise NoSamples(f"other {name}s: {len(differing):,} differ, {name} {key[1]} of {key[0]} the first (its {what})")


def _block(record: Record) -> int:
    """Windows in a block, as the task's own standard error has it: ceil(eval_len / stride)."""
    said = whole(mapping(dict(record.run.metadata), "standard_error").get("block_windows"))
    protocol = record.protocol
    if not said and protocol.eval_len and protocol.stride:
        said = -(-protocol.eval_len // protocol.stride)
    if not said:
        raise NoSamples(f"{record.file} does not say how far its windows overlap (standard_error.block_windows)")
    return said


def _about(label: str, pairs: list[Pair]) -> str:
    """How the figures were made, for whoever reads the table."""
    methods = {pair.verdict.method.partition(",")[0]: pair.verdict for pair in pairs if pair.verdict is not None}
    tested = sum(pair.p_holm is not None for pair in pairs)
    if not tested:
        return f"Δ is model − {label}. Fewer than {MIN_BLOCKS} blocks of windows, or documents, allow no verdict."
    how = "; ".join(
        f"{method}, t at {verdict.units - 1} degrees of freedom" if "bootstrap" in method else f"{method} test"
        for method, verdict in methods.items()
        if verdict.p is not None
    )
    return (
        f"Δ is model − {label}, in pairs ({how}). The 95 % intervals are each pair's own; p is corrected for the "
        f"{tested} pairs of this table (Holm). ≈: not told apart (p ≥ {ALPHA:g})."
    )


def check_formed(label: str, found: Sequence[Pairs]) -> None:
    """CompareError where not one pair could be made, with the first reason."""
    if any(pairs.formed for pairs in found):
        return
    reasons = [pair.reason for pairs in found for pair in pairs.pairs.values() if pair.reason]
    why = reasons[0] if reasons else "there is no other model"
    raise CompareError(f"--versus {label}: no pair can be made: {why}", NOTHING_USABLE)
