"""Builds result files of runs against a stored reference, and the samples beside them, from simulated tokens.

Every figure is computed here from the tokens by numpy's own functions, so that tests can compare with it.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.compare.conftest import Content, Folder, quantization, result, sha

TASK = "wiki2_strided"
EDGES = [-10 + 0.25 * i for i in range(49)]
BUCKETS = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


def divergent(
    label: str = "Q4",
    family: str = "GGUF",
    bpw: float | None = 4.85,
    size: float = 0.02,
    *,
    scheme: str | None = None,
    role: str = "comparison",
    reference: str = "reference",
    windows: int = 20,
    seed: int = 1,
    rounding: bool = True,
    **changes: Any,
) -> tuple[Content, list[Content]]:
    """A result file and its samples. `size`: about the median divergence in nats."""
    rng, per_window = np.random.default_rng(seed), 400
    confidence = np.random.default_rng(0).beta(0.8, 0.7, (windows, per_window))
    kld = size * np.exp(1.9 * rng.standard_normal((windows, per_window))) * (1.05 - confidence)
    agree = rng.random((windows, per_window)) > np.minimum(0.45, 2.2 * kld**0.5)
    hard = np.random.default_rng(7).normal(3.2, 0.35, windows)  # the difficulty of the text, the same for every model
    nll = per_window * (hard + 1.4 * size + rng.normal(0, 0.02 * size**0.5, windows))
    reference_nll = per_window * hard
    content = result(
        label, family, scheme or label, bpw, tokens=changes.pop("tokens", "main"), windows=windows, **changes
    )
    count = windows * per_window

    def ratio(values: np.ndarray) -> float:
        return float(values.sum() / values.size)

    figures = {
        "token_perplexity,none": math.exp(nll.sum() / count),
        "kld,none": ratio(kld), "kld_stderr,none": float(kld.mean(axis=1).std(ddof=1) / math.sqrt(windows)),
        **{f"kld_{name},none": float(np.percentile(kld, p))
           for name, p in (("median", 50), ("p90", 90), ("p99", 99), ("p999", 99.9))},
        "kld_median_stderr,none": 0.05 * size, "kld_p99_stderr,none": size, "kld_p999_stderr,none": "N/A",
        "kld_max,none": float(kld.max()), "kld_max_stderr,none": "N/A",
        "top1_agreement,none": ratio(agree), "top1_agreement_stderr,none": 0.002,
        "mean_delta_p,none": -0.3 * size, "rms_delta_p,none": size**0.5 / 2,
        "ppl_ratio,none": math.exp((nll.sum() - reference_nll.sum()) / count), "ppl_ratio_stderr,none": size / 20,
    }  # fmt: skip
    content["results"][TASK].update(figures)
    content["higher_is_better"][TASK].update(
        {"kld": False, "top1_agreement": True, "rms_delta_p": False, "ppl_ratio": False, "mean_delta_p": False}
    )
    logs = np.log10(np.maximum(kld, 1e-300)).ravel()
    content["configs"][TASK]["metadata"]["divergence"] = {
        "role": role,
        "reference": {"id": sha(reference), "label": "BF16", "engine": "vllm", "engine_version": "0.26.0",
                      "dtype": "bfloat16", "mode": "hidden"},
        "rounding": {"kld": 2.1e-6, "kld_max": 3e-4, "engine": "vllm"} if rounding else None,
        "vocabulary": 49152, "tokens": count, "unit": "nats",
        "quantiles": {f"{p:g}": float(np.percentile(kld, p)) for p in PERCENTS},
        "histogram": {"log10_edges": EDGES, "counts": np.histogram(logs, EDGES)[0].tolist(),
                      "below": int((logs < EDGES[0]).sum()), "above": int((logs > EDGES[-1]).sum())},
        "by_confidence": [_bucket(kld, agree, confidence, low, high) for low, high in pairwise(BUCKETS)],
        "errors": {"method": "block bootstrap", "block_windows": 4, "blocks": windows // 4},
    }  # fmt: skip
    lines = [
        {
            "doc_id": i,
            "doc": {"window": i, "start": 512 * i, "end": 512 * i + 2048, "first_target": 512 * i + 1},
            "target": "", "arguments": [], "resps": [], "filtered_resps": [], "filter": "none",
            "metrics": ["token_perplexity", "kld", "top1_agreement"],
            "doc_hash": sha(f"window {i}"), "prompt_hash": sha(f"prompt {i}"), "target_hash": sha(""),
            "token_perplexity": _sum(i, float(nll[i]), per_window),
            "kld": _sum(i, float(kld[i].sum()), per_window),
            "top1_agreement": _sum(i, float(agree[i].sum()), per_window),
        }
        for i in range(windows)
    ]  # fmt: skip
    return content, lines


def by_position(
    slope: float = 0.001, level: float = 0.02, error: float = 0.0005, windows: int = 9, longest: int = 32768
) -> Content:
    """``metadata.by_position`` of disjoint windows: from position 16 on, a divergence grows by `slope` per doubling."""
    edges = [1, 16]
    while 2 * edges[-1] < longest:
        edges.append(2 * edges[-1])
    edges.append(longest)
    bins = range(len(edges) - 1)

    def curve(values: list[float], errors: float, slope: float) -> Content:
        return {"values": values, "stderr": [errors] * len(values), "slope": slope, "slope_stderr": errors / 4}

    return {
        "edges": edges,
        "tokens": [windows * (b - a) for a, b in pairwise(edges)],
        "blocks": windows,
        "metrics": {
            "token_perplexity": curve([20 / (i + 1) for i in bins], 0.3, -0.2),
            "kld": curve([level + slope * i for i in bins], error, slope),
            "top1_agreement": curve([0.95 - 0.002 * i for i in bins], 0.001, -0.002),
            "ppl_ratio": curve([1.01 + 0.001 * i for i in bins], 0.001, 0.001),
        },
    }


def _sum(window: int, total: float, count: int) -> Content:
    return {"window": window, "total": total, "count": count, "nonfinite": 0}


def _bucket(kld: np.ndarray, agree: np.ndarray, confidence: np.ndarray, low: float, high: float) -> Content:
    inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
    n = int(inside.sum())
    return {
        "from": low, "to": high, "tokens": n,
        "kld": float(kld[inside].mean()) if n else None, "kld_stderr": float(kld[inside].std() / n**0.5) if n else None,
        "top1_agreement": float(agree[inside].mean()) if n else None,
    }  # fmt: skip


def write(folder: Folder, content: Content, lines: list[Content] | None = None, task: str = TASK) -> Path:
    """Writes the result file, and its samples beside it, named as the harness names both."""
    file = folder.write(content)
    if lines is not None:
        write_samples(file, lines, task)
    return file


def write_samples(file: Path, lines: list[Content], task: str = TASK) -> Path:
    beside = file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return beside


LADDER = (
    ("EXL3", "EXL3 3.0bpw", 3.03, 0.035), ("EXL3", "EXL3 4.0bpw", 4.03, 0.009), ("EXL3", "EXL3 5.0bpw", 5.03, 0.0026),
    ("EXL3", "EXL3 6.0bpw", 6.03, 0.0008),
    ("GGUF", "GGUF Q3_K_M", 3.91, 0.045), ("GGUF", "GGUF Q4_K_M", 4.85, 0.013), ("GGUF", "GGUF Q5_K_M", 5.7, 0.0035),
    ("GGUF", "GGUF Q6_K", 6.56, 0.0011), ("GGUF", "GGUF Q8_0", 8.5, 0.00006),
    ("NVFP4", "NVFP4A16", 4.5, 0.028), ("FP8", "FP8", 8.0, 0.004),
)  # fmt: skip


def fill(folder: Folder, samples: bool = True) -> None:
    """Adds a reference in vLLM, the same weights in llama.cpp, and eleven quantized models."""
    models = [divergent("BF16", "full precision", 16.0, 2e-6, scheme="bfloat16", role="reference", engine="vllm")]
    models.append(divergent("BF16 GGUF", "full precision", 16.0, 9e-5, scheme="bf16", engine="llama.cpp", seed=2))
    for number, (family, label, bpw, size) in enumerate(LADDER, 3):
        engine = {"EXL3": "exllamav3", "GGUF": "llama.cpp"}.get(family, "vllm")
        models.append(divergent(label, family, bpw, size, engine=engine, seed=number))
    for content, lines in models:
        write(folder, content, lines if samples else None)


__all__ = ["EDGES", "LADDER", "PERCENTS", "TASK", "divergent", "fill", "quantization", "write", "write_samples"]
