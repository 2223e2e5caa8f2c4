"""Turns divergences per token into the figures of a result: means, quantiles, buckets, errors. Needs numpy only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from compare.metrics import METRICS
from lmeval_ext import metrics
from lmeval_ext.metrics import Floats, Integers, WindowSum

# Quantiles in the result's metadata, in percent, and those that are metrics of their own
QUANTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
QUANTILE_METRICS = {m.name: m.percent for m in METRICS.values() if m.percent is not None}
_LAST_WITH_ERROR = 99.0  # beyond this percentile a few tokens decide, and a bootstrap says nothing
_QUANTILE_RESAMPLES = 1000
_CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_HISTOGRAM_EDGES = np.linspace(-10, 2, 49)  # log10 of nats, in quarters
_NOT_ABOUT_THE_REFERENCE = ("role", "vocabulary", "rounding", "model_weights_sha256")


@dataclass(frozen=True, eq=False)
class WindowDivergence:
    """One window's divergence and log-probabilities, one value per scored token; all figures are made from these.

    kld, reference_logprobs, logprobs (the model's), confidence: float64 [tokens], over the tokens of the vocabulary
    that both models have. agree: bool [tokens]. reference: identity of the reference (`session.DivergenceSource`).
    """

    window: int
    kld: Floats
    agree: npt.NDArray[np.bool_]
    reference_logprobs: Floats
    confidence: Floats
    logprobs: Floats
    reference: dict[str, Any]

    @classmethod
    def of(cls, window: int, divergence: dict[str, Any]) -> WindowDivergence:
        """Read `WindowScores.divergence` of the window with this index."""
        names = ("kld", "reference_logprobs", "confidence")
        arrays = {name: np.asarray(divergence[name], np.float64) for name in names}
        return cls(
            window=window,
            agree=np.asarray(divergence["agree"], bool),
            logprobs=np.asarray(divergence["model_logprobs"], np.float64),
            reference=divergence["reference"],
            **arrays,
        )

    def __str__(self) -> str:  # for --log_samples, which already writes the values with the model's response
        return f"{len(self.kld)} tokens"

    @property
    def delta_p(self) -> Floats:
        """Δp = p(true token | model) − p(true token | reference), as in llama.cpp's --kl-divergence."""
        change: Floats = np.exp(self.logprobs) - np.exp(self.reference_logprobs)
        return change

    def by_token(self, finite_only: bool = False) -> dict[str, Floats]:
        """The values per token that each metric of `MEANS` is formed from, float64 [tokens].

        kld: D_KL in nats. top1_agreement: 1 where both have the same first choice. mean_delta_p: Δp. rms_delta_p: Δp².
        ppl_ratio: ln p_reference − ln p_model of the true token. finite_only: all are NaN where one is not finite.
        """
        values = {
            "kld": self.kld,
            "top1_agreement": self.agree.astype(np.float64),
            "mean_delta_p": self.delta_p,
            "rms_delta_p": self.delta_p**2,
            "ppl_ratio": self.reference_logprobs - self.logprobs,
        }
        finite = np.isfinite(values["kld"]) & np.isfinite(values["ppl_ratio"])
        return {name: np.where(finite, v, np.nan) for name, v in values.items()} if finite_only else values

    def sums(self) -> dict[str, WindowSum]:
        """What this window adds to each metric of `MEANS`: the sum of its values per token (`by_token`)."""
        values = self.by_token()
        nonfinite = int((~np.isfinite(self.kld) | ~np.isfinite(values["ppl_ratio"])).sum())
        return {
            name: {"window": self.window, "total": float(v.sum()), "count": len(v), "nonfinite": nonfinite}
            for name, v in values.items()
        }


# Metrics formed from the sums of `WindowDivergence.sums`. ppl_ratio = PPL(model) / PPL(reference) is exp of the mean of
# ln p_reference − ln p_model of the true tokens; its error is that of paired differences, in which most of the
# text's own variation cancels.
MEANS = tuple(m.name for m in METRICS.values() if m.needs_reference and m.formula is not None)


def quantile(windows: Sequence[WindowDivergence], percent: float) -> float | None:
    """Quantile of the divergences of all tokens, in nats; None if one of them is not finite.

    With linear interpolation (Hyndman and Fan 1996, type 7), as in llama.cpp.
    """
    kld = _kld_in_order(windows)
    return None if kld is None else float(np.percentile(kld, percent))


def quantile_error(windows: Sequence[WindowDivergence], percent: float, block_windows: int) -> float | None:
    """Standard error of a quantile by `metrics.bootstrap_error`, with 1,000 resamples.

    Blocks of `block_windows` consecutive windows are drawn with all their tokens, and the quantile is taken over the
    tokens of each resample. None below five blocks, and beyond the 99th percentile, which a few tokens decide.
    """
    kld = _kld_in_order(windows)
    if kld is None or percent > _LAST_WITH_ERROR:
        return None
    lengths = [len(w.kld) for w in sorted(windows, key=lambda w: w.window)]
    block = np.repeat(metrics.block_of_window(len(windows), block_windows), lengths)  # of each token
    order = np.argsort(kld, kind="stable")
    resampled = partial(_resampled_quantiles, kld=kld[order], block=block[order], percent=percent)
    return metrics.bootstrap_error(metrics.count_blocks(len(windows), block_windows), _QUANTILE_RESAMPLES, resampled)


def describe(windows: Sequence[WindowDivergence], block_windows: int) -> dict[str, Any]:
    """`divergence` in the task's metadata: quantiles, histogram, buckets by confidence, and the reference."""
    kld = _kld_in_order(windows)
    roles = {w.reference.get("role") for w in windows}
    reference = windows[0].reference
    return {
        "role": roles.pop() if len(roles) == 1 else None,
        "unit": METRICS["kld"].unit,
        "direction": "D_KL(reference || model)",
        "tokens": sum(len(w.kld) for w in windows),
        "vocabulary": reference.get("vocabulary"),
        "weights_sha256": reference.get("model_weights_sha256"),
        "reference": {k: v for k, v in reference.items() if k not in _NOT_ABOUT_THE_REFERENCE},
        "rounding": _rounding(windows),
        "quantiles": None if kld is None else {f"{q:g}": float(np.percentile(kld, q)) for q in QUANTILES},
        "histogram": None if kld is None else _histogram(kld),
        "by_confidence": [
            _bucket(windows, low, high, block_windows) for low, high in itertools.pairwise(_CONFIDENCE_EDGES)
        ],
    }


def _kld_in_order(windows: Sequence[WindowDivergence]) -> Floats | None:
    """Divergences of all tokens, float64 [tokens], in the order of the windows; None if one is not finite."""
    kld = np.concatenate([w.kld for w in sorted(windows, key=lambda w: w.window)])
    return kld if len(kld) and np.isfinite(kld).all() else None


def _resampled_quantiles(draws: Integers, kld: Floats, block: Integers, percent: float) -> Floats:
    """The quantile of each resample, float64 [resamples], without building the resample.

    draws: blocks drawn, [resamples, blocks]. kld: all tokens in ascending order. block: of each of them.
    """
    quantiles = np.empty(len(draws))
    for i, draw in enumerate(draws):
        times_drawn = np.bincount(draw, minlength=draws.shape[1])
        ends = np.cumsum(times_drawn[block])  # tokens of the resample up to and including each value
        position = percent / 100 * (ends[-1] - 1)
        low = int(position)
        a, b = np.searchsorted(ends, [low, min(low + 1, ends[-1] - 1)], side="right")
        quantiles[i] = kld[a] + (position - low) * (kld[b] - kld[a])
    return quantiles


def _rounding(windows: Sequence[WindowDivergence]) -> dict[str, Any] | None:
    """D_KL(reference ‖ logits of the engine that wrote it) over these windows; None if unknown for one of them."""
    parts = [w.reference.get("rounding") for w in windows]
    if any(part is None for part in parts):
        return None
    sums, largest = zip(*((part["kld_sum"], part["kld_max"]) for part in parts if part), strict=True)
    reference = windows[0].reference
    return {
        "kld": math.fsum(sums) / sum(len(w.kld) for w in windows),
        "kld_max": max(largest),
        "engine": reference.get("engine"),
        "dtype": reference.get("dtype"),
    }


def _histogram(kld: Floats) -> dict[str, Any]:
    """Counts of log10 D_KL. `below`: values under the first edge, among them zero and negative ones from rounding."""
    edges = 10.0**_HISTOGRAM_EDGES
    counts, _ = np.histogram(kld[(kld >= edges[0]) & (kld <= edges[-1])], edges)
    return {
        "log10_edges": _HISTOGRAM_EDGES.tolist(),
        "counts": counts.tolist(),
        "below": int((kld < edges[0]).sum()),
        "above": int((kld > edges[-1]).sum()),
    }


def _bucket(windows: Sequence[WindowDivergence], low: float, high: float, block_windows: int) -> dict[str, Any]:
    """Figures of the tokens for which the reference's largest probability is in [low, high), or in [low, 1]."""
    kld: list[WindowSum] = []
    agree: list[WindowSum] = []
    for w in windows:
        inside = (w.confidence >= low) & ((w.confidence < high) | (high == 1.0))
        nonfinite = int((~np.isfinite(w.kld[inside])).sum())
        for sums, values in ((kld, w.kld), (agree, w.agree)):
            total = float(values[inside].sum())
            sums.append(WindowSum(window=w.window, total=total, count=int(inside.sum()), nonfinite=nonfinite))
    return {
        "from": low,
        "to": high,
        "tokens": sum(s["count"] for s in kld),
        "kld": metrics.token_mean(kld),
        "kld_stderr": metrics.standard_error(kld, metrics.token_mean, block_windows),
        "top1_agreement": metrics.token_mean(agree),
        "top1_agreement_stderr": metrics.standard_error(agree, metrics.token_mean, block_windows),
    }
