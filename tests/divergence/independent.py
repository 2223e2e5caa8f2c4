"""Computes divergences with Transformers and numpy alone: models run directly, log-softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lmeval_ext.requests import WindowRequest
from tests.conftest import load_task


def windows_of(folder: Path, task: str = "sample_strided", limit: int | None = None, **metadata: Any) -> list[Any]:
    """The task's windows, tokenized for the model in `folder`."""
    loaded = load_task(task, pretrained=str(folder), **metadata)
    loaded.build_all_requests(limit=limit)
    return list(loaded.instances)


def log_probabilities(
    folder: Path, windows: Sequence[WindowRequest], dtype: str = "float32", vocabulary: int | None = None
) -> list[np.ndarray]:
    """Log-probabilities of each window's targets, float64 [targets, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    logprobs = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window.ids[:-1]]), use_cache=False).logits[0].double().numpy()
        x = logits[-len(window.target_ids) :, :vocabulary]
        x = x - x.max(axis=1, keepdims=True)
        logprobs.append(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))
    return logprobs


def divergences(
    reference: Sequence[np.ndarray], model: Sequence[np.ndarray], windows: Sequence[WindowRequest]
) -> dict[str, np.ndarray]:
    """One value per scored token of all windows, by name."""
    p, q = np.concatenate(reference), np.concatenate(model)
    targets = np.concatenate([w.target_ids for w in windows])
    rows = np.arange(len(targets))
    return {
        "kld": (np.exp(p) * (p - q)).sum(axis=1),
        "agree": p.argmax(axis=1) == q.argmax(axis=1),
        "reference_logprobs": p[rows, targets],
        "confidence": np.exp(p.max(axis=1)),
        "logprobs": q[rows, targets],
    }


def figures(by_token: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a result, from `divergences`."""
    kld, p, q = by_token["kld"], by_token["reference_logprobs"], by_token["logprobs"]
    change = np.exp(q) - np.exp(p)
    return {
        "kld": kld.mean(),
        "kld_median": np.percentile(kld, 50),
        "kld_p90": np.percentile(kld, 90),
        "kld_p99": np.percentile(kld, 99),
        "kld_p999": np.percentile(kld, 99.9),
        "kld_max": kld.max(),
        "top1_agreement": by_token["agree"].mean(),
        "mean_delta_p": change.mean(),
        "rms_delta_p": np.sqrt((change**2).mean()),
        "ppl_ratio": np.exp(p.mean() - q.mean()),
        "token_perplexity": np.exp(-q.mean()),
    }
