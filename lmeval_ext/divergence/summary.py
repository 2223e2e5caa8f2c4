"""From the divergences of tokens to the figures of a result: means, quantiles, buckets, errors. numpy only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmeval_ext import metrics
from lmeval_ext.metrics import WindowSum

Floats = npt.NDArray[np.float64]

# Quantiles in the result's metadata, in percent, and those that are metrics of their own
QUANTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
QUANTILE_METRICS = {"kld_median": 50.0, "kld_p90": 90.0, "kld_p99": 99.0, "kld_p999": 99.9, "kld_max": 100.0}
# Beyond it too few tokens decide for a bootstrap to say anything
LAST_WITH_ERROR = 99.0
CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
HISTOGRAM = np.linspace(-10, 2, 49)  # log10 of nats, in quarters
_QUANTILE_RESAMPLES = 1000
_NOT_OF_THE_REFERENCE = ("role", "vocabulary", "rounding", "model_weights_sha256")


@dataclass(frozen=True, eq=False)
class TokenValues:
    """One window's scored tokens: what the figures are made of.

    kld, reference_logprobs, logprobs (the model's), confidence: float64 [tokens], over the tokens that both have.
    agree: bool. reference: what the divergences are from (`session._About`).
    """

    window: int
    kld: Floats
    agree: npt.NDArray[np.bool_]
    reference_logprobs: Floats
    confidence: Floats
    logprobs: Floats
    reference: dict[str, Any]

    @classmethod
    def of(cls, window: int, said: dict[str, Any]) -> TokenValues:
        """From `WindowScores.divergence`."""
        arrays = {name: np.asarray(said[name], np.float64) for name in ("kld", "reference_logprobs", "confidence")}
        return cls(
            window=window,
            agree=np.asarray(said["agree"], bool),
            logprobs=np.asarray(said["model_logprobs"], np.float64),
            reference=said["reference"],
            **arrays,
        )

    def __str__(self) -> str:  # what --log_samples writes of it: its values stand in the model's answer
        return f"{len(self.kld)} tokens"

    @property
    def delta_p(self) -> Floats:
        """Δp = p(true token | model) − p(true token | reference), as in llama.cpp's --kl-divergence."""
        change: Floats = np.exp(self.logprobs) - np.exp(self.reference_logprobs)
        return change

    def sums(self) -> dict[str, WindowSum]:
        """What this window adds to each mean.

        kld: Σ D_KL. top1_agreement: tokens with the same first choice. mean_delta_p: Σ Δp. rms_delta_p: Σ Δp².
        ppl_ratio: Σ (ln p_reference − ln p_model) of the true tokens.
        """
        values = {
            "kld": self.kld,
            "top1_agreement": self.agree.astype(np.float64),
            "mean_delta_p": self.delta_p,
            "rms_delta_p": self.delta_p**2,
            "ppl_ratio": self.reference_logprobs - self.logprobs,
        }
        bad = int((~np.isfinite(self.kld) | ~np.isfinite(values["ppl_ratio"])).sum())
        return {
            name: {"window": self.window, "total": float(v.sum()), "count": len(v), "nonfinite": bad}
            for name, v in values.items()
        }


# metric: (aggregate of window sums, higher is better; None: neither). PPL(model) / PPL(reference) is exp of the mean of
# ln p_reference − ln p_model of the true tokens; its error is of paired differences, in which most of the text's own
# variation cancels.
MEANS: dict[str, tuple[Callable[[Sequence[WindowSum]], float | None], bool | None]] = {
    "kld": (metrics.accuracy, False),
    "top1_agreement": (metrics.accuracy, True),
    "mean_delta_p": (metrics.accuracy, None),
    "rms_delta_p": (metrics.root_mean_square, False),
    "ppl_ratio": (metrics.perplexity, False),
}


def quantile(values: Sequence[TokenValues], percent: float) -> float | None:
    """Of the divergences of all tokens, with linear interpolation (Hyndman and Fan 1996, type 7; llama.cpp's too)."""
    found = _all_kld(values)
    return None if found is None else float(np.percentile(found, percent))


def quantile_error(values: Sequence[TokenValues], percent: float, block_windows: int) -> float | None:
    """Standard error of a quantile up to the 99th, by the block bootstrap of `metrics.standard_error`.

    Resampled, with replacement, are blocks of `block_windows` consecutive windows with all their tokens, 1,000 times
    with a fixed seed; the quantile is taken of the tokens of each resample. None below five blocks, and beyond the 99th
    percentile, which a few tokens decide.
    """
    kld = _all_kld(values)
    blocks = metrics.count_blocks(len(values), block_windows)
    if kld is None or blocks < metrics.MIN_BLOCKS or percent > LAST_WITH_ERROR:
        return None
    ordered = sorted(values, key=lambda v: v.window)
    block = np.concatenate([np.full(len(v.kld), min(i // block_windows, blocks - 1)) for i, v in enumerate(ordered)])
    order = np.argsort(kld, kind="stable")
    kld, block = kld[order], block[order]
    rng = np.random.default_rng(20240229)
    found = np.empty(_QUANTILE_RESAMPLES)
    for i in range(_QUANTILE_RESAMPLES):
        times = np.bincount(rng.integers(blocks, size=blocks), minlength=blocks)
        ends = np.cumsum(times[block])  # after how many tokens of the resample each value ends
        at = percent / 100 * (ends[-1] - 1)
        low = int(at)
        a, b = np.searchsorted(ends, [low, min(low + 1, ends[-1] - 1)], side="right")
        found[i] = kld[a] + (at - low) * (kld[b] - kld[a])
    return float(found.std(ddof=1) * math.sqrt(blocks / (blocks - 1)))


def _all_kld(values: Sequence[TokenValues]) -> Floats | None:
    """Of all tokens in the order of the windows; None where one is not finite."""
    kld = np.concatenate([v.kld for v in sorted(values, key=lambda v: v.window)])
    return kld if len(kld) and np.isfinite(kld).all() else None


def describe(values: Sequence[TokenValues], block_windows: int) -> dict[str, Any]:
    """`divergence` of the task's metadata: quantiles, histogram, buckets by confidence, the reference."""
    kld = _all_kld(values)
    role = {v.reference.get("role") for v in values}
    return {
        "role": role.pop() if len(role) == 1 else None,
        "unit": "nats",
        "direction": "D_KL(reference || model)",
        "tokens": sum(len(v.kld) for v in values),
        "vocabulary": values[0].reference.get("vocabulary"),
        "weights_sha256": values[0].reference.get("model_weights_sha256"),
        "reference": {k: v for k, v in values[0].reference.items() if k not in _NOT_OF_THE_REFERENCE},
        "rounding": _rounding(values),
        "quantiles": None if kld is None else {f"{q:g}": float(np.percentile(kld, q)) for q in QUANTILES},
        "histogram": None if kld is None else _histogram(kld),
        "by_confidence": [_bucket(values, low, high, block_windows) for low, high in itertools.pairwise(CONFIDENCE)],
    }


def _rounding(values: Sequence[TokenValues]) -> dict[str, Any] | None:
    """D_KL(reference ‖ the logits of the engine that wrote it), over these windows."""
    told = [v.reference.get("rounding") for v in values]
    if any(r is None for r in told):
        return None
    sums, largest = zip(*((r["kld_sum"], r["kld_max"]) for r in told if r), strict=True)
    about = values[0].reference
    return {
        "kld": math.fsum(sums) / sum(len(v.kld) for v in values),
        "kld_max": max(largest),
        "engine": about.get("engine"),
        "dtype": about.get("dtype"),
    }


def _histogram(kld: Floats) -> dict[str, Any]:
    """Counts of log10 D_KL; `below`: smaller than the first edge, zero and the negative ones of rounding among them."""
    edges = 10.0**HISTOGRAM
    counts, _ = np.histogram(kld[(kld >= edges[0]) & (kld <= edges[-1])], edges)
    return {
        "log10_edges": HISTOGRAM.tolist(),
        "counts": counts.tolist(),
        "below": int((kld < edges[0]).sum()),
        "above": int((kld > edges[-1]).sum()),
    }


def _bucket(values: Sequence[TokenValues], low: float, high: float, block_windows: int) -> dict[str, Any]:
    """Of the tokens where the reference's largest probability is in [low, high), or [low, 1] for the last."""
    kld, agree = [], []
    for v in values:
        inside = (v.confidence >= low) & ((v.confidence < high) | (high == 1.0))
        bad = int((~np.isfinite(v.kld[inside])).sum())
        count = int(inside.sum())
        kld.append(WindowSum(window=v.window, total=float(v.kld[inside].sum()), count=count, nonfinite=bad))
        agree.append(WindowSum(window=v.window, total=float(v.agree[inside].sum()), count=count, nonfinite=bad))
    error = functools.partial(metrics.standard_error, block_windows=block_windows)
    return {
        "from": low,
        "to": high,
        "tokens": sum(s["count"] for s in kld),
        "kld": metrics.accuracy(kld),
        "kld_stderr": error(kld, metrics.accuracy),
        "top1_agreement": metrics.accuracy(agree),
        "top1_agreement_stderr": error(agree, metrics.accuracy),
    }
