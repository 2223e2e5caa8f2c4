"""The metrics: names, directions, ideal values, and how each figure is formed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]


NAMES = {
    "token_perplexity": "Perplexity",
    "word_perplexity": "Word perplexity",
    "byte_perplexity": "Byte perplexity",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "top1_accuracy": "Top-1 accuracy",
    "top1_agreement": "Top-1 agreement",
    "acc": "Accuracy",
    "acc_norm": "Normalized accuracy",
    "exact_match": "Exact match",
    "kld": "KL divergence (nats)",
    "kld_median": "Median KL divergence (nats)",
    "kld_p90": "90th percentile of the KL divergence (nats)",
    "kld_p99": "99th percentile of the KL divergence (nats)",
    "kld_p999": "99.9th percentile of the KL divergence (nats)",
    "kld_max": "Largest KL divergence (nats)",
    "mean_delta_p": "Mean Δp of the true token",
    "rms_delta_p": "RMS Δp of the true token",
    "ppl_ratio": "Perplexity ratio to the reference",
}


# For files that do not say which way is up.
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "kld", "rms_delta_p", "ppl_ratio")


def figure_of(key: str, rolling: bool) -> Callable[[Array, Array], Array]:
    """What sums and counts make, element by element, as the harness and our tasks define the figure.

    exp(Σ NLL / Σ tokens) for our perplexity and its ratio, √(Σ Δp² / Σ tokens), Σ NLL / ln 2 / Σ bytes; of the
    harness' rolling log-likelihoods exp(−Σ ln p / Σ words) and −Σ ln p / ln 2 / Σ bytes, and exp(−mean ln p) where each
    document has one (lm_eval/api/metrics.py: weighted_perplexity, bits_per_byte, perplexity); else the mean,
    Σ total / Σ count.
    """
    import numpy as np

    metric = key.partition(",")[0]
    if metric in ("token_perplexity", "ppl_ratio"):
        return lambda total, count: np.exp(total / count)
    if metric == "rms_delta_p":
        return lambda total, count: np.sqrt(total / count)
    if metric == "bits_per_byte":
        sign = -1.0 if rolling else 1.0
        return lambda total, count: sign * total / count / math.log(2)
    if metric == "perplexity" or (rolling and metric.endswith("_perplexity")):
        return lambda total, count: np.exp(-total / count)
    return lambda total, count: total / count


def ideal(metric: str) -> float:
    """The figure of a model that does not differ from the reference at all."""
    return 1.0 if metric in ("top1_agreement", "ppl_ratio") else 0.0


KLD = "kld"


# What a run says beside the mean divergence.
OF_A_RUN = ("kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max", "top1_agreement", "mean_delta_p", "rms_delta_p",
            "ppl_ratio")  # fmt: skip


_OTHERS = ("top1_agreement", "mean_delta_p", "rms_delta_p", "ppl_ratio")


def from_reference(metric: str) -> bool:
    """Whether a metric's figure means nothing without the reference: ``kld``, ``kld_p99``, ``top1_agreement`` …"""
    return metric == KLD or metric.startswith("kld_") or metric in _OTHERS
