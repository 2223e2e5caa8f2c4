"""Whether the difference between two models is more than chance, from pairs of the same windows or questions.

Takes blocks or documents, returns an interval and a p-value. An unpaired test would add the errors of both models,
most of which they share because the text is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compare.metrics import Array, Formula

CONFIDENCE = 0.95
MIN_BLOCKS = 5
RESAMPLES, _FEWEST, _DRAWS = 10_000, 1_000, 20_000_000
_SEED = 20240229


@dataclass(frozen=True)
class PairedDifference:
    """A difference `value` with its 95 % interval and p-value, which are None where there are too few blocks.

    units: the number of blocks, documents or groups of documents. error: the standard error; skew: the
    skewness of one unit's difference. Both None as above, and for McNemar's test.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    units: int = 0
    method: str = ""
    error: float | None = None
    skew: float | None = None


def bootstrap(first: Array, second: Array, formula: Formula) -> PairedDifference:
    """formula(first) − formula(second) by a paired bootstrap over rows. Raises ValueError where it is not finite.

    first, second: [B, 2], the sum and the count of each block, or document; the same row has the same tokens or the
    same question in both. Rows are resampled with replacement, the same ones for both models (Künsch 1989; Koehn 2004
    for the pairing). The standard error is the standard deviation over 10,000 resamples (fewer for many rows, but at
    least 1,000), times √(B / (B − 1)) (Efron and Tibshirani 1993, §5.3).

    The interval is difference ± t × standard error with Student's t at B − 1 degrees of freedom, not the percentiles of
    the resamples: for few blocks these lie far too close together, by the factor √((B − 1) / B) and because they
    approximate the normal distribution's quantiles instead of t's (Hesterberg 2015, The American Statistician 69:371,
    on the narrowness of percentile intervals). p comes from the same t, two-sided. Below `MIN_BLOCKS` rows interval and
    p are None.
    """
    import numpy as np

    blocks = len(first)
    difference = float(_one(formula, first) - _one(formula, second))
    if not math.isfinite(difference):
        raise ValueError("overflows a float")
    if blocks < MIN_BLOCKS:
        return PairedDifference(difference, units=blocks)
    rng = np.random.default_rng(_SEED)
    resamples = max(_FEWEST, min(RESAMPLES, _DRAWS // blocks))
    step = max(1, 2_000_000 // blocks)
    both = np.concatenate([first, second], axis=1)
    differences = []
    for start in range(0, resamples, step):
        draws = rng.integers(blocks, size=(min(step, resamples - start), blocks))
        sums = np.stack([column[draws].sum(axis=1) for column in both.T])
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            differences.append(formula(sums[0], sums[1]) - formula(sums[2], sums[3]))
    error = float(np.concatenate(differences).std(ddof=1)) * math.sqrt(blocks / (blocks - 1))
    if not math.isfinite(error):
        raise ValueError("has no finite standard error")
    return replace(_by_t(difference, error, blocks), skew=_skewness(both, formula))


def _skewness(both: Array, formula: Formula) -> float:
    """The skewness of the units' differences, from the jackknife's pseudo-values; 0 where all are equal.

    both: [B, 4], sums and counts of the first and the second model. A pseudo-value is B × (the difference of all units)
    − (B − 1) × (the difference without one unit); for a mean, that unit's own difference.
    """
    import numpy as np
    from scipy import stats

    rest = both.sum(axis=0) - both
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        pseudo = -(formula(rest[:, 0], rest[:, 1]) - formula(rest[:, 2], rest[:, 3]))
    if not np.isfinite(pseudo).all() or np.ptp(pseudo) <= 1e-12 * np.abs(pseudo).max():
        return 0.0
    return float(stats.skew(pseudo, bias=False))


def _one(formula: Formula, rows: Array) -> float:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total, count = rows.sum(axis=0)
        return float(formula(np.array([total]), np.array([count]))[0])


def _by_t(difference: float, error: float, blocks: int) -> PairedDifference:
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, blocks - 1)) * error
    # without error every block has the same difference
    ratio = abs(difference) / error if error else math.inf if difference else 0.0
    p = float(2 * stats.t.sf(ratio, blocks - 1))
    return PairedDifference(difference, difference - half, difference + half, p, blocks, "paired bootstrap", error)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """The share of correct documents in `first` minus that in `second`, each 0 or 1; documents taken as independent.

    p: McNemar's test in its exact form, two-sided (McNemar 1947; a binomial test of the b documents that only `first`
    has right against the c that only `second` has, at one half). The interval is Wald's with one document added to b
    and to c (Bonett and Price 2012, J. Educ. Behav. Stat. 37:479; recommended by Fagerland, Lydersen and Laake 2014,
    Stat. Med. 33:2850): d ± z √((b + c + 2) / (n + 2) − d²) / √(n + 2) with d = (b − c) / (n + 2). It is not the
    inversion of p, so the two may disagree at the edge of significance; p decides.
    """
    from scipy import stats

    n = len(first)
    b = sum(one > other for one, other in zip(first, second, strict=True))
    c = sum(one < other for one, other in zip(first, second, strict=True))
    p = float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    middle = (b - c) / (n + 2)
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(((b + c + 2) / (n + 2) - middle**2) / (n + 2))
    low, high = max(middle - half, -1.0), min(middle + half, 1.0)
    return PairedDifference((b - c) / n, low, high, p, n, f"exact McNemar, {b} to {c}")


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values (1979): the i-th smallest of m times m − i + 1, not below the previous one, at most 1.

    Rejecting where they are below α keeps the probability of any false rejection among all m below α.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = worst
    return adjusted


def blocks_of(rows: Sequence[tuple[float, float]], block_windows: int) -> Array:
    """[blocks, 2]: the sums and counts of `block_windows` consecutive windows each.

    Overlapping windows score some tokens twice, so single windows are not independent; windows a block apart share no
    token. Windows left over after the last full block join it, as in the tasks' own standard errors.
    """
    import numpy as np

    table = np.array(rows, dtype=np.float64).reshape(-1, 2)
    count = len(table) // block_windows
    block_of_row = np.minimum(np.arange(len(table)) // block_windows, max(count - 1, 0))
    result = np.zeros((max(count, 1), 2))
    np.add.at(result, block_of_row, table)
    return result
