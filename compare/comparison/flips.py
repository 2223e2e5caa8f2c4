"""Which answers change between two models: right to wrong, wrong to right, and from one answer to another.

Two models of equal accuracy can answer many questions differently; the changes cancel in the accuracy and not for the
user (Dutta et al. 2024, arXiv 2407.09141, "flips").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compare.comparison.significance import CONFIDENCE, MIN_BLOCKS
from compare.results.samples import Unit


@dataclass(frozen=True)
class Share:
    """`count` of `total` questions, and the 95 % interval of their share; None with fewer than five groups."""

    count: int
    total: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float:
        return self.count / self.total


@dataclass(frozen=True)
class Flips:
    """Changes from the baseline's answers to the model's.

    both: right to wrong and wrong to right. changed: the chosen answer is another one, right or wrong; None where the
    samples do not show which answer was chosen.
    """

    right_to_wrong: Share
    wrong_to_right: Share
    both: Share
    changed: Share | None


def count_flips(pairs: Sequence[tuple[Unit, Unit]]) -> Flips:
    """The flips of (baseline, model) pairs of right-or-wrong questions; at least one."""
    groups = [ours.group for _, ours in pairs]
    lost = [base.total > ours.total for base, ours in pairs]
    gained = [base.total < ours.total for base, ours in pairs]
    return Flips(
        right_to_wrong=share(lost, groups),
        wrong_to_right=share(gained, groups),
        both=share([a or b for a, b in zip(lost, gained, strict=True)], groups),
        changed=share([base.answer != ours.answer for base, ours in pairs], groups) if _shown(pairs) else None,
    )


def _shown(pairs: Sequence[tuple[Unit, Unit]]) -> bool:
    """Whether all chosen answers are known, and none is right in one model and wrong in the other."""
    return all(
        base.answer is not None and ours.answer is not None and (base.answer != ours.answer or base.total == ours.total)
        for base, ours in pairs
    )


def share(marked: Sequence[bool], groups: Sequence[str]) -> Share:
    """The share of marked questions with its 95 % interval.

    Wilson's interval (Wilson 1927, J. Am. Stat. Assoc. 22:209) for independent questions. Where the questions come in
    groups, such as those on one text: share ± t × standard error of a ratio over groups (Cochran 1977, Sampling
    Techniques, §6.8), cut off at 0 and 1; no interval for fewer than five groups.
    """
    from scipy import stats

    count, total = sum(marked), len(marked)
    if not any(groups):
        interval = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
        return Share(count, total, float(interval.low), float(interval.high))
    members: dict[str, list[bool]] = {}
    for one, group in zip(marked, groups, strict=True):
        members.setdefault(group, []).append(one)
    k, value = len(members), count / total
    if k < MIN_BLOCKS:
        return Share(count, total, None, None)
    squares = math.fsum((sum(own) - value * len(own)) ** 2 for own in members.values())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, k - 1)) * math.sqrt(k / (k - 1) * squares) / total
    return Share(count, total, max(0.0, value - half), min(1.0, value + half))
