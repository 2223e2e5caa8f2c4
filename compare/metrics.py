"""The metrics: one row of `METRICS` per metric, read by tables, plots, noise floors and this project's own tasks.

A metric that a new row describes needs no change elsewhere in `compare`. Metrics without a row are shown under their
own name, with the direction that the result file gives (`metric_named`). Leaf module: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]
    Formula = Callable[[Array, Array], Array]

PERPLEXITY = "token_perplexity"
KLD = "kld"


# ------------------------------------------------------------------ formulas: sums and counts to a figure, elementwise


def mean(total: Array, count: Array) -> Array:
    """Σ total / Σ count."""
    return total / count


def exp_of_mean(total: Array, count: Array) -> Array:
    """exp(Σ NLL / Σ tokens): the perplexity of this project's tasks, and its ratio."""
    import numpy as np

    return np.exp(total / count)


def exp_of_negative_mean(total: Array, count: Array) -> Array:
    """exp(−Σ ln p / Σ count): the harness' perplexities (lm_eval/api/metrics.py: perplexity, weighted_perplexity)."""
    import numpy as np

    return np.exp(-total / count)


def root_of_mean(total: Array, count: Array) -> Array:
    """√(Σ squares / Σ count)."""
    import numpy as np

    return np.sqrt(total / count)


def mean_in_bits(total: Array, count: Array) -> Array:
    """Σ NLL / ln 2 / Σ bytes (Gao et al. 2020, The Pile, §3.1)."""
    return total / count / math.log(2)


def negative_mean_in_bits(total: Array, count: Array) -> Array:
    """−Σ ln p / ln 2 / Σ bytes: the harness' bits_per_byte (lm_eval/api/metrics.py)."""
    return -total / count / math.log(2)


# ------------------------------------------------------------------ the table


class LossForm(Enum):
    """How a loss against the original is said: in the metric's own unit, as a ratio in per cent, or in points."""

    DIFFERENCE = "difference"
    RATIO = "ratio"
    POINTS = "points"


@dataclass(frozen=True)
class Metric:
    """What a metric is, and how it is shown.

    name: the key in result files, without the filter. title: as on an axis, without the unit.
    higher_is_better: None where the best value is `ideal` and neither direction is better.
    ideal: the value of a perfect model; where `needs_reference`, of a model that equals the reference.
    two_sided: values on both sides of `ideal` occur, so that noise has both signs.
    formula: the figure from the sums and counts of windows or documents; None for a figure that is not formed from
    them. rolling_formula: the same for the harness' rolling log-likelihoods, where it differs.
    percent: for a quantile over all tokens, which one; `formula` is then None.
    needs_reference: the value compares the model with a stored reference.
    log_axis: values span decades, so that a plot has a logarithmic axis by default.
    column: heading of the column beside the mean KL divergence in a table; empty: no such column.
    loss: how the loss against the original is said.
    progress, progress_digits: name in the progress lines of `compare run`, and decimals of the standard error there;
    an empty name: not shown.
    """

    name: str
    title: str
    higher_is_better: bool | None
    ideal: float | None = None
    unit: str = ""
    two_sided: bool = False
    formula: Formula | None = mean
    rolling_formula: Formula | None = None
    percent: float | None = None
    needs_reference: bool = False
    log_axis: bool = False
    column: str = ""
    loss: LossForm = LossForm.DIFFERENCE
    progress: str = ""
    progress_digits: int = 6

    @property
    def title_with_unit(self) -> str:
        """``KL divergence (nats)``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


def _quantile(name: str, title: str, percent: float, column: str = "") -> Metric:
    return Metric(
        name, title, False, 0.0, "nats", formula=None, percent=percent, needs_reference=True, log_axis=True,
        column=column,
    )  # fmt: skip


# Tables and JSON records list metrics in this order.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(PERPLEXITY, "Perplexity", False, 1.0, formula=exp_of_mean, loss=LossForm.RATIO, progress="perplexity",
               progress_digits=3),
        Metric("word_perplexity", "Word perplexity", False, 1.0, rolling_formula=exp_of_negative_mean,
               loss=LossForm.RATIO),
        Metric("byte_perplexity", "Byte perplexity", False, 1.0, rolling_formula=exp_of_negative_mean,
               loss=LossForm.RATIO),
        Metric("perplexity", "Perplexity", False, 1.0, formula=exp_of_negative_mean, loss=LossForm.RATIO),
        Metric("bits_per_byte", "Bits per byte", False, 0.0, formula=mean_in_bits,
               rolling_formula=negative_mean_in_bits),
        Metric("top1_accuracy", "Top-1 accuracy", True, 1.0, loss=LossForm.POINTS),
        Metric("acc", "Accuracy", True, 1.0, loss=LossForm.POINTS),
        Metric("acc_norm", "Normalized accuracy", True, 1.0, loss=LossForm.POINTS),
        Metric("exact_match", "Exact match", True, 1.0, loss=LossForm.POINTS),
        Metric("first_divergence", "First divergent token", True, unit="tokens"),
        Metric("common_prefix", "Share of the answer in common", True, 1.0, loss=LossForm.POINTS),
        Metric("identical_answers", "Identical answers", True, 1.0, loss=LossForm.POINTS),
        Metric(KLD, "KL divergence", False, 0.0, "nats", needs_reference=True, log_axis=True,
               progress="KL divergence"),
        _quantile("kld_median", "Median KL divergence", 50.0, column="Median"),
        _quantile("kld_p90", "90th percentile of the KL divergence", 90.0),
        _quantile("kld_p99", "99th percentile of the KL divergence", 99.0, column="99 %"),
        _quantile("kld_p999", "99.9th percentile of the KL divergence", 99.9),
        _quantile("kld_max", "Largest KL divergence", 100.0),
        Metric("top1_agreement", "Top-1 agreement", True, 1.0, needs_reference=True, column="Top-1 agreement",
               loss=LossForm.POINTS),
        Metric("mean_delta_p", "Mean Δp of the true token", None, 0.0, two_sided=True, needs_reference=True),
        Metric("rms_delta_p", "RMS Δp of the true token", False, 0.0, formula=root_of_mean, needs_reference=True),
        # PPL(model) / PPL(reference): below 1 where the model predicts the text better
        Metric("ppl_ratio", "Perplexity ratio to the reference", False, 1.0, two_sided=True, formula=exp_of_mean,
               needs_reference=True, column="PPL ratio", loss=LossForm.RATIO),
    )
}  # fmt: skip

# Parts of the names of metrics without a row, for files that do not give a direction.
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "kld", "rms_delta_p", "ppl_ratio")


def metric_named(name: str) -> Metric:
    """The row of `METRICS`, or one that follows from the name alone.

    A metric without a row called ``kld_…`` needs a reference, and one called ``…_perplexity`` is formed from rolling
    log-likelihoods as the harness' own are.
    """
    known = METRICS.get(name)
    if known is not None:
        return known
    divergence = name.startswith(f"{KLD}_")
    return Metric(
        name,
        name,
        False if any(part in name for part in _LOWER_IS_BETTER) else None,
        ideal=0.0 if divergence else None,
        formula=None if divergence else mean,
        rolling_formula=exp_of_negative_mean if name.endswith("_perplexity") else None,
        needs_reference=divergence,
        log_axis=name.startswith(KLD),
    )


def needs_reference(name: str) -> bool:
    """Whether a metric's value compares a model with a stored reference: ``kld``, ``kld_p99``, ``top1_agreement`` …"""
    return metric_named(name).needs_reference


def formula_of(name: str, rolling: bool) -> Formula:
    """The figure from sums and counts, elementwise, as the harness and this project's tasks define it.

    rolling: the sums are the harness' rolling log-likelihoods. Raises ValueError for a metric not formed from sums.
    """
    metric = metric_named(name)
    formula = (metric.rolling_formula if rolling else None) or metric.formula
    if formula is None:
        raise ValueError(f"{name} is not formed from sums and counts")
    return formula


def beside_kld() -> tuple[Metric, ...]:
    """The metrics that a run against a reference reports beside the mean KL divergence, in the order of the table."""
    return tuple(metric for metric in METRICS.values() if metric.needs_reference and metric.name != KLD)
