"""Whether two models differ by less than a margin: two one-sided tests, and how many units a decision needs.

A difference that is not significant is not shown to be small. Two one-sided tests show it: one that the difference is
above −margin, one that it is below +margin, each at level α; p is the larger of the two (Schuirmann 1987, J.
Pharmacokinet. Biopharm. 15:657).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Counts = npt.NDArray[np.int64]

ALPHA = 0.05
POWER = 0.8
# Probability that the discordance lies outside the interval over which the exact test takes its largest p; added to p.
_OUTSIDE = 1e-5
_GRID, _FINE = 64, 16


@dataclass(frozen=True)
class Equivalence:
    """The test of a difference against ±`margin`, both on the same scale. p: not corrected for other pairs.

    needed: units (questions, blocks …) that a decision needs, see `needed_units`; None where no number is enough.
    """

    margin: float
    p: float
    needed: int | None


def by_t(difference: float, error: float, units: int, margin: float, skew: float = 0.0) -> float:
    """p of the two one-sided t tests with `units` − 1 degrees of freedom.

    error: standard error of `difference`; skew: skewness of one unit's difference. Where most units lie below a mean
    that a few make, as with divergences, t finds the mean too small too often. So the first term of the Edgeworth
    expansion of a Studentized mean, |skew| (2 t² + 1) φ(t) / (6 √units) (Hall 1992, The Bootstrap and Edgeworth
    Expansion, §2.6), is added to p on the side that the skewness favours, and never subtracted on the other.
    """
    from scipy import special

    if not error:
        return 0.0 if abs(difference) < margin else 1.0

    def side(t: float, favoured: float) -> float:
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        more = max(0.0, favoured) * (2 * t * t + 1) * density / (6 * math.sqrt(units))
        return min(1.0, float(special.stdtr(units - 1, -t)) + more)

    return max(side((margin - difference) / error, skew), side((margin + difference) / error, -skew))


def paired_shares(b: int, c: int, n: int, margin: float) -> float:
    """p of the two one-sided tests on n questions: b are right in the first model alone, c in the second alone.

    The difference is (b − c) / n. Each side is exact: see `_exact`.
    """
    return max(_exact(b, c, n, margin), _exact(c, b, n, margin))


def score(b: Counts, c: Counts, n: int, difference: float) -> npt.NDArray[np.float64]:
    """Tango's score statistic for H0: P(first alone right) − P(second alone right) = `difference`, elementwise.

    (b − c − n·d) / √(n (2 p + d (1 − d))), where p is the maximum-likelihood estimate of P(second alone right) under
    H0 (Tango 1998, Stat. Med. 17:891). About standard normal for many questions, and McNemar's z for d = 0.
    """
    import numpy as np

    linear = -b - c + (2 * n - b + c) * difference
    root = np.sqrt(linear**2 + 8 * n * c * difference * (1 - difference))
    second_alone = (root - linear) / (4 * n)
    variance = n * (2 * second_alone + difference * (1 - difference))
    return np.asarray((b - c - n * difference) / np.sqrt(variance), dtype=np.float64)


def _exact(b: int, c: int, n: int, margin: float) -> float:
    """p of H0: P(first alone right) − P(second alone right) ≤ −margin, against "above −margin".

    The normal approximation of Tango's statistic rejects too often where few questions are discordant, so p is exact:
    the largest probability, over all discordances q = P(first alone) + P(second alone), of a statistic at least as
    large as the observed one. It is attained at the boundary of H0 (Hsueh, Liu and Chen 2001, Biometrics 57:478). q is
    searched in its Clopper-Pearson interval of confidence 1 − 10⁻⁵, and 10⁻⁵ is added (Berger and Boos 1994, J. Am.
    Stat. Assoc. 89:1012). For a given number m of discordant questions, the statistic falls as c grows, so that the
    probability is a sum of binomial probabilities: Σ P(m) P(c ≤ k(m) | m).
    """
    import numpy as np
    from scipy import stats

    discordant = b + c
    least = float(stats.beta.ppf(_OUTSIDE / 2, discordant, n - discordant + 1)) if discordant else 0.0
    most = float(stats.beta.ppf(1 - _OUTSIDE / 2, discordant + 1, n - discordant)) if discordant < n else 1.0
    least = max(least, margin)  # H0 implies q ≥ margin
    if most <= least:
        return _OUTSIDE
    observed = float(score(np.array([b]), np.array([c]), n, -margin)[0])
    m = np.arange(_beyond(n, least, -1), _beyond(n, most, 1) + 1)
    at_most = _largest_c(m, n, margin, observed)

    def probability(q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        column = q[:, None]
        terms = stats.binom.pmf(m, n, column) * stats.binom.cdf(at_most, m, (column + margin) / (2 * column))
        return np.asarray(terms.sum(axis=1), dtype=np.float64)

    grid = np.linspace(least, most, _GRID)
    values = probability(grid)
    top = int(values.argmax())
    around = np.linspace(grid[max(top - 1, 0)], grid[min(top + 1, _GRID - 1)], _FINE)
    return min(1.0, float(max(values[top], probability(around).max())) + _OUTSIDE)


def _beyond(n: int, q: float, sign: int) -> int:
    """A number of discordant questions of n that is exceeded with negligible probability: 8 standard deviations off."""
    bound = n * q + sign * (8 * math.sqrt(n * q * (1 - q)) + 8)
    return min(n, max(0, math.floor(bound) if sign < 0 else math.ceil(bound)))


def _largest_c(m: Counts, n: int, margin: float, observed: float) -> Counts:
    """For each number m of discordant questions, the largest c with a statistic of at least `observed`; −1 for none."""
    import numpy as np

    low, high = np.full(len(m), -1), m.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        reached = score(m - middle, middle, n, -margin) >= observed - 1e-9
        low, high = np.where(reached, middle, low), np.where(reached, high, middle - 1)
    return low


def needed_units(difference: float, spread: float, margin: float, alpha: float) -> int | None:
    """How many independent units a decision needs with 80 % power, if the models differ as observed.

    difference: per unit; spread: the standard deviation of one unit's difference. The smaller of two numbers, since
    either decides:

    - to show equivalence, where |difference| < margin: (z(1−α) + z(1−β/2))² spread² / (margin − |difference|)² (Chow,
      Shao and Wang 2008, Sample Size Calculations in Clinical Research, §3.1.3);
    - to show a difference: (z(1−α/2) √(spread² + difference²) + z(1−β) spread)² / difference², for shares Connor's
      formula for McNemar's test (1987, Biometrics 43:207), where spread² + difference² is the share of discordant
      questions.

    None where the difference equals the margin and has no spread.
    """
    from scipy import stats

    z = stats.norm.ppf
    numbers = []
    room = margin - abs(difference)
    if room > 0:
        numbers.append(((z(1 - alpha) + z((1 + POWER) / 2)) * spread / room) ** 2)
    if difference:
        both = z(1 - alpha / 2) * math.hypot(spread, difference) + z(POWER) * spread
        numbers.append((both / difference) ** 2)
    finite = [number for number in numbers if math.isfinite(number) and number < 1e15]
    return math.ceil(min(finite)) if finite else None
