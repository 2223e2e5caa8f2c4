"""Every model of a comparison against a baseline, paired by window or document: ``compare table --versus LABEL``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compare.comparison import equivalence
from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.equivalence import ALPHA, Equivalence
from compare.comparison.flips import Flips, count_flips
from compare.comparison.labels import find_label
from compare.comparison.margins import Margin, MarginOption, form_of, margin_of
from compare.comparison.paired_samples import CheckedSamples, MatchedSamples, match
from compare.comparison.point import Point
from compare.comparison.significance import MIN_BLOCKS, PairedDifference, bootstrap, holm, mcnemar
from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import LossForm, formula_of
from compare.results.samples import NoSamples
from compare.text import round_up

if TYPE_CHECKING:
    from compare.metrics import Formula

NOT_APART = "not told apart"


@dataclass(frozen=True)
class Pair:
    """A model against the baseline: their difference, or the reason why there is none.

    log_ratio: ln(model / baseline), for perplexities. p_holm, equivalence_p_holm: the p-values, corrected for all pairs
    of the comparison. per_unit: questions or windows per independent unit. note: documents that are in no pair.
    is_baseline: the model is the baseline itself.
    """

    difference: PairedDifference | None = None
    log_ratio: PairedDifference | None = None
    flips: Flips | None = None
    equivalence: Equivalence | None = None
    p_holm: float | None = None
    equivalence_p_holm: float | None = None
    per_unit: float = 1.0
    windows: bool = False
    note: str = ""
    reason: str = ""
    is_baseline: bool = False

    @property
    def separated(self) -> bool | None:
        """Whether the data separate the two models; None where they are too few to tell."""
        return None if self.p_holm is None else self.p_holm < ALPHA

    @property
    def equivalent(self) -> bool | None:
        """Whether the two models differ by less than the margin; None without a margin, and where data are too few."""
        return None if self.equivalence_p_holm is None else self.equivalence_p_holm < ALPHA


@dataclass
class Pairs:
    """The pairs of a comparison, by `id` of their point. label: the baseline's. about: how they were formed."""

    label: str
    pairs: dict[int, Pair] = field(default_factory=dict)
    margin: Margin | None = None
    about: str = ""

    def pair(self, point: Point) -> Pair:
        return self.pairs[id(point)]

    @property
    def formed(self) -> bool:
        return any(pair.difference is not None for pair in self.pairs.values())

    def verdict(self, point: Point, higher_is_better: bool | None) -> str:
        """The model against the baseline: ``better``, ``worse, within 1 point``, ``equivalent within 1 point``,
        ``undecided: needs about 9,800 questions``, ``not told apart`` (without a margin), ``too few windows`` …"""
        pair = self.pair(point)
        if pair.is_baseline:
            return "baseline"
        if pair.difference is None:
            return "no pair"
        if pair.separated is None:
            return "too few windows" if pair.windows else "too few documents"
        if pair.separated:
            better = None if higher_is_better is None else (pair.difference.value > 0) == higher_is_better
            direction = {True: "better", False: "worse", None: "differs"}[better]
            return f"{direction}, within {self.margin}" if pair.equivalent else direction
        if pair.equivalent is None:
            return NOT_APART
        return f"equivalent within {self.margin}" if pair.equivalent else f"undecided{_needs(pair)}"


def _needs(pair: Pair) -> str:
    """``: needs about 9,800 questions``; a power formula may also name fewer than there are, and then it says so."""
    assert pair.equivalence is not None
    assert pair.difference is not None
    needed, kind = pair.equivalence.needed, "windows" if pair.windows else "questions"
    if needed is None:
        return ""
    if needed <= pair.difference.units:
        return f": needs a few more {kind}"
    return f": needs about {round_up(math.ceil(needed * pair.per_unit)):,} {kind}"


def measure_pairs(
    points: Sequence[Point], metric: ChosenMetric, label: str, margins: Sequence[MarginOption] = ()
) -> Pairs:
    """Pairs every model with the baseline called `label`. Raises CompareError if there is none."""
    if metric.averaged:
        raise CompareError("--versus pairs the documents of a task, so it cannot be combined with --mean: leave it out")
    found = find_label([point.record.label for point in points], label, "--versus", f" of {metric.label}")
    baseline = next(point for point in points if point.record.label == found)
    samples = CheckedSamples(metric.key)
    matched: dict[int, MatchedSamples] = {}
    pairs: dict[int, Pair] = {}
    for point in points:
        if point is baseline:
            pairs[id(point)] = Pair(is_baseline=True)
            continue
        try:
            matched[id(point)] = match(point.record, baseline.record, metric, samples)
            pairs[id(point)] = _pair(matched[id(point)], metric)
        except NoSamples as error:
            pairs[id(point)] = Pair(reason=str(error))
    margin = margin_of(metric, margins, all(each.shares for each in matched.values()))
    if margin is not None:
        tested = sum(pair.difference is not None and pair.difference.p is not None for pair in pairs.values())
        for key, pair in pairs.items():
            if pair.difference is not None and pair.difference.p is not None:
                pairs[key] = replace(pair, equivalence=_equivalence(matched[key], pair, margin, ALPHA / tested))
    for key, p in _corrected(pairs, lambda pair: pair.difference.p if pair.difference is not None else None):
        pairs[key] = replace(pairs[key], p_holm=p)
    for key, p in _corrected(pairs, lambda pair: pair.equivalence.p if pair.equivalence is not None else None):
        pairs[key] = replace(pairs[key], equivalence_p_holm=p)
    result = Pairs(baseline.record.label, pairs, margin)
    labels = {id(point): point.record.label for point in points}
    result.about = "\n".join(_about(result, labels))
    return result


def _corrected(pairs: dict[int, Pair], p_of: Callable[[Pair], float | None]) -> list[tuple[int, float]]:
    """The p-value of each pair that has one, corrected for all of these (Holm)."""
    p_values = {key: p for key, pair in pairs.items() if (p := p_of(pair)) is not None}
    return list(zip(p_values, holm(list(p_values.values())), strict=True))


def _pair(matched: MatchedSamples, metric: ChosenMetric) -> Pair:
    """The model − the baseline, and for right and wrong answers the flips. Raises NoSamples where it is not finite."""
    formula = formula_of(metric.metric, matched.rolling)
    flips = count_flips(matched.pairs) if matched.right_or_wrong else None
    log_ratio = None
    if flips is not None and not matched.grouped:
        difference = mcnemar([unit.total for _, unit in matched.pairs], [unit.total for unit, _ in matched.pairs])
    else:
        difference = _bootstrap(matched, formula)
    if form_of(metric, False) is LossForm.RATIO:
        log_ratio = _bootstrap(matched, _logarithm(formula))
    if matched.note:
        difference = replace(difference, method=f"{difference.method}, over the {matched.note}")
    per_unit = float(matched.block) if matched.windows else len(matched.pairs) / len(matched.rows)
    return Pair(difference, log_ratio, flips, per_unit=per_unit, windows=matched.windows, note=matched.note)


def _bootstrap(matched: MatchedSamples, formula: Formula) -> PairedDifference:
    try:
        difference = bootstrap(matched.rows, matched.others, formula)
    except ValueError as error:
        raise NoSamples(f"the difference {error}") from None
    return replace(difference, method=f"paired bootstrap over {difference.units:,} {matched.kind}")


def _logarithm(formula: Formula) -> Formula:
    """The formula's logarithm, whose differences are log ratios."""
    import numpy as np

    return lambda total, count: np.log(formula(total, count))


def _equivalence(matched: MatchedSamples, pair: Pair, margin: Margin, alpha: float) -> Equivalence:
    """The two one-sided tests of a pair with enough units; `alpha` is the level that the needed number is for."""
    measured = pair.log_ratio if margin.form is LossForm.RATIO and pair.log_ratio is not None else pair.difference
    assert measured is not None
    if pair.flips is not None and not matched.grouped:
        n = pair.flips.both.total
        p = equivalence.paired_shares(pair.flips.wrong_to_right.count, pair.flips.right_to_wrong.count, n, margin.bound)
        # one more flip each way, so that no flip at all does not promise that there will never be one
        spread = math.sqrt(max(0.0, (pair.flips.both.count + 2) / (n + 2) - measured.value**2))
    else:
        assert measured.error is not None
        p = equivalence.by_t(measured.value, measured.error, measured.units, margin.bound, measured.skew or 0.0)
        spread = measured.error * math.sqrt(measured.units)
    needed = equivalence.needed_units(measured.value, spread, margin.bound, alpha)
    return Equivalence(margin.bound, p, needed)


def _about(pairs: Pairs, labels: dict[int, str]) -> Iterator[str]:
    """How the figures were formed: the sentences below the table."""
    formed = {key: pair for key, pair in pairs.pairs.items() if pair.difference is not None}
    methods = {p.difference.method.partition(",")[0]: p.difference for p in formed.values() if p.difference is not None}
    tested = sum(pair.p_holm is not None for pair in formed.values())
    if tested:
        how = "; ".join(
            f"{method}, t at {difference.units - 1} degrees of freedom" if "bootstrap" in method else f"{method} test"
            for method, difference in methods.items()
            if difference.p is not None
        )
        yield (
            f"Δ is model − {pairs.label}, in pairs ({how}), with 95 % intervals, each pair's own; p is corrected for "
            f"the {tested} pairs of this table (Holm)."
        )
    else:
        yield (
            f"Δ is model − {pairs.label}. Fewer than {MIN_BLOCKS} blocks of windows, or documents, allow no verdict."
        )
    if pairs.margin is not None and tested:
        yield (
            f"Equivalent: two one-sided tests show a difference of less than {pairs.margin} either way (p < "
            f"{ALPHA:g}, Holm). Undecided: neither equivalent nor different; the number is for a power of "
            f"{equivalence.POWER * 100:.0f} %, if the models differ as they do here."
        )
    elif tested:
        yield f"≈: not told apart (p ≥ {ALPHA:g}), which does not say that they are equivalent; --margin tests that."
    flips = [pair.flips for pair in formed.values() if pair.flips is not None]
    if flips:
        yield "Flips: answers that turned from right to wrong, or from wrong to right."
    if any(each.changed for each in flips):
        yield "Other answer: another one was chosen, right or wrong."
    for key, pair in formed.items():
        if pair.note:
            yield f"{labels[key]}: over the {pair.note}."


def check_formed(label: str, comparisons: Sequence[Pairs]) -> None:
    """Raises CompareError with the first reason if no pair at all could be formed."""
    if any(pairs.formed for pairs in comparisons):
        return
    reasons = [pair.reason for pairs in comparisons for pair in pairs.pairs.values() if pair.reason]
    reason = reasons[0] if reasons else "there is no other model"
    raise CompareError(f"--versus {label}: no pair can be formed: {reason}", NOTHING_USABLE)
