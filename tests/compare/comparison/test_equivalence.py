"""Two one-sided tests: against scipy, by hand, by enumeration; error rates over 10,000 pairs at the margin."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from scipy import optimize, stats

from compare.comparison.equivalence import by_t, needed_units, paired_shares, score
from compare.comparison.significance import bootstrap
from compare.metrics import mean

PAIRS = 10_000


# ------------------------------------------------------------------ right and wrong answers


@pytest.mark.parametrize(("b", "c", "n", "difference"), [(5, 9, 100, -0.03), (0, 4, 50, -0.1), (30, 12, 400, 0.02)])
def test_score_statistic_uses_the_restricted_maximum_of_the_likelihood(b, c, n, difference):
    """Tango's closed form against a numerical maximum over P(second alone right)."""

    def negative(p: float) -> float:
        return -(stats.multinomial.logpmf([b, c, n - b - c], n, [p + difference, p, 1 - 2 * p - difference]))

    low, high = max(0.0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9
    p = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    by_hand = (b - c - n * difference) / math.sqrt(n * (2 * p + difference - difference**2))
    assert float(score(np.array([b]), np.array([c]), n, difference)[0]) == pytest.approx(by_hand, rel=1e-4)


def test_score_statistic_without_a_margin_is_mcnemars():
    assert float(score(np.array([20]), np.array([9]), 300, 0.0)[0]) == pytest.approx(11 / math.sqrt(29))


@pytest.mark.parametrize("discordant", [1, 7, 40])
@pytest.mark.parametrize("margin", [0.01, 0.1, 0.4])
def test_score_statistic_falls_with_every_answer_lost(discordant, margin):
    """The sum over the critical region needs that."""
    c = np.arange(discordant + 1)
    assert (np.diff(score(discordant - c, c, 60, -margin)) < 0).all()


@pytest.mark.parametrize(("b", "c", "n", "margin"), [(1, 2, 30, 0.15), (0, 0, 25, 0.12), (3, 1, 40, 0.1)])
def test_exact_p_equals_the_largest_probability_by_enumeration(b, c, n, margin):
    """All outcomes (b, c) at least as extreme, by scipy's multinomial, over 2,000 discordances."""
    outcomes = np.array([(i, j) for i in range(n + 1) for j in range(n + 1 - i)])

    def side(b: int, c: int) -> float:
        extreme = score(outcomes[:, 0], outcomes[:, 1], n, -margin) >= score(np.array([b]), np.array([c]), n, -margin)
        kept = np.column_stack([outcomes[extreme], n - outcomes[extreme].sum(axis=1)])
        probabilities = [
            stats.multinomial.pmf(kept, n, [(q - margin) / 2, (q + margin) / 2, 1 - q]).sum()
            for q in np.linspace(margin, 1, 2000)
        ]
        return max(probabilities)

    expected = max(side(b, c), side(c, b))
    assert paired_shares(b, c, n, margin) == pytest.approx(expected, abs=2e-4)
    assert paired_shares(c, b, n, margin) == pytest.approx(paired_shares(b, c, n, margin))


def test_exact_p_agrees_with_the_score_test_for_many_questions():
    p = paired_shares(560, 620, 14_042, 0.01)
    approximate = stats.norm.sf(float(score(np.array([560]), np.array([620]), 14_042, -0.01)[0]))
    assert p == pytest.approx(approximate, rel=0.05)
    assert 0.005 < p < 0.05
    assert paired_shares(500, 700, 14_042, 0.01) > 0.5


def test_no_flip_in_few_questions_does_not_show_equivalence():
    assert paired_shares(0, 0, 100, 0.01) > 0.3
    assert paired_shares(0, 0, 1000, 0.01) < 0.001


CASES = [  # questions, margin, share of discordant questions
    (100, 0.028, 0.028),  # where the score test rejects in 6 % of the cases
    (100, 0.05, 0.06),
    (100, 0.05, 0.3),
    (100, 0.1, 0.12),
    (1000, 0.01, 0.012),
    (1000, 0.02, 0.2),
    (5000, 0.01, 0.02),
]


def rejects(b: int, c: int, n: int, margin: float) -> bool:
    return _rejects(max(b, c), min(b, c), n, margin)


@cache
def _rejects(b: int, c: int, n: int, margin: float) -> bool:
    return paired_shares(b, c, n, margin) < 0.05


def draws(n: int, margin: float, discordance: float) -> np.ndarray:
    """[10,000, 3] counts of pairs whose true difference is −margin; the test is symmetric."""
    alone = (discordance - margin) / 2, (discordance + margin) / 2
    return np.random.default_rng(17).multinomial(n, [*alone, 1 - discordance], size=PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "margin", "discordance"), CASES)
def test_models_that_differ_by_the_margin_are_rarely_called_equivalent(n, margin, discordance):
    called = sum(rejects(int(b), int(c), n, margin) for b, c, _ in draws(n, margin, discordance))
    assert called / PAIRS <= 0.05


def test_normal_approximation_would_call_too_many_equivalent():
    """Why the test is exact: the score test alone, at the same margin."""
    counts = draws(100, 0.028, 0.028)
    z = score(counts[:, 0], counts[:, 1], 100, -0.028)
    assert (stats.norm.sf(z) < 0.05).mean() > 0.055


@pytest.mark.slow
def test_equal_models_are_called_equivalent_with_the_power_of_the_formula():
    """The number of questions for equal models: about 80 % of the pairs are then called equivalent."""
    discordance, margin = 0.1, 0.02
    n = needed_units(0.0, math.sqrt(discordance), margin, 0.05)
    counts = np.random.default_rng(3).multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], size=2000)
    called = sum(rejects(int(b), int(c), n, margin) for b, c, _ in counts)
    assert 0.76 < called / 2000 < 0.84


# ------------------------------------------------------------------ perplexities and divergences


@pytest.mark.parametrize("blocks", [5, 40])
def test_t_tests_equal_scipys_two_one_sided_tests(blocks):
    rng = np.random.default_rng(blocks)
    x = rng.normal(0.002, 0.01, blocks)
    error = stats.sem(x)
    low = stats.ttest_1samp(x, -0.01, alternative="greater").pvalue
    high = stats.ttest_1samp(x, 0.01, alternative="less").pvalue
    assert by_t(float(x.mean()), float(error), blocks, 0.01) == pytest.approx(max(low, high), rel=1e-9)


def test_skewness_adds_to_p_on_the_side_that_it_favours():
    plain = by_t(0.0, 1.0, 20, 2.0)
    more = 0.6 * (2 * 4 + 1) * stats.norm.pdf(2) / (6 * math.sqrt(20))
    assert by_t(0.0, 1.0, 20, 2.0, 0.6) == pytest.approx(plain + more)
    assert by_t(0.0, 1.0, 20, 2.0, -0.6) == pytest.approx(plain + more)
    assert by_t(1.0, 1.0, 20, 2.0, -0.6) == pytest.approx(by_t(1.0, 1.0, 20, 2.0)), "never subtracted"


def test_equal_blocks_are_equivalent_only_within_the_margin():
    assert by_t(0.001, 0.0, 5, 0.01) == 0
    assert by_t(0.02, 0.0, 5, 0.01) == 1


def test_skewness_of_a_mean_is_that_of_its_units():
    values = np.random.default_rng(1).gamma(1.0, size=30)
    ones = np.ones(30)
    paired = bootstrap(np.column_stack([values, ones]), np.column_stack([0 * values, ones]), mean)
    assert paired.skew == pytest.approx(stats.skew(values, bias=False))
    assert paired.error == pytest.approx(stats.sem(values), rel=0.03)


def blocks_at(kind: str, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """[10,000, blocks] standardized differences: log ratios of perplexities are symmetric, divergences are not.

    The skewness 0.12 is that of the mean of 8,000 tokens whose divergences are log-normal with σ = 1.15, as those of
    EXL3 4.0 in docs/metrics.md (median 0.027, 99 % 0.37).
    """
    if kind == "perplexity ratio":
        return rng.standard_t(8, (PAIRS, blocks)) * math.sqrt(6 / 8)
    shape = 4 / 0.12**2
    return (rng.gamma(shape, size=(PAIRS, blocks)) - shape) / math.sqrt(shape)


@pytest.mark.parametrize("blocks", [5, 12, 60])
@pytest.mark.parametrize(("kind", "sign"), [("perplexity ratio", 1), ("divergence", 1), ("divergence", -1)])
def test_blocks_that_differ_by_the_margin_are_rarely_called_equivalent(kind, blocks, sign):
    """10,000 pairs whose true difference is ± the margin. Error and skewness are what `bootstrap` finds for blocks of
    equal size (test_skewness_of_a_mean_is_that_of_its_units), in closed form."""
    margin = 0.01
    own = sign * margin + 0.1 * margin * blocks_at(kind, blocks, np.random.default_rng(blocks))
    means, errors = own.mean(axis=1), own.std(axis=1, ddof=1) / math.sqrt(blocks)
    skews = stats.skew(own, axis=1, bias=False)
    p = [by_t(*each, blocks, margin, skew) for *each, skew in zip(means, errors, skews, strict=True)]
    assert np.mean(np.array(p) < 0.05) <= 0.05


# ------------------------------------------------------------------ how many are needed


def test_needed_questions_worked_by_hand():
    """Equal models, 10 % discordant, one point: (1.644854 + 1.281552)² · 0.1 / 0.01² = 8,563.9."""
    assert needed_units(0.0, math.sqrt(0.1), 0.01, 0.05) == 8564
    # a difference beyond the margin: Connor's formula, as on powerandsamplesize.com for p01 = 0.45, p10 = 0.05
    spread = math.sqrt(0.5 - 0.4**2)
    by_hand = ((1.959964 * math.sqrt(0.5) + 0.841621 * spread) / 0.4) ** 2
    assert needed_units(-0.4, spread, 0.01, 0.05) == math.ceil(by_hand) == 23


def test_needed_questions_are_those_of_the_easier_decision():
    small, large = needed_units(0.002, 0.3, 0.01, 0.05), needed_units(0.009, 0.3, 0.01, 0.05)
    equivalent = ((1.644854 + 1.281552) * 0.3 / 0.008) ** 2
    different = ((1.959964 * math.hypot(0.3, 0.009) + 0.841621 * 0.3) / 0.009) ** 2
    assert small == pytest.approx(equivalent, abs=1)
    assert large == pytest.approx(different, abs=1)
    assert needed_units(0.01, 0.0, 0.01, 0.05) is not None
    assert needed_units(0.002, 0.3, 0.01, 0.005) > small, "a stricter level needs more"
