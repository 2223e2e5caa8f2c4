"""Everything known of a point, at full precision: the records of the JSON and CSV tables."""

from __future__ import annotations

from typing import Any

from compare.comparison.comparison import Comparison
from compare.comparison.memory import fit, memory_bytes
from compare.comparison.point import Point
from compare.metrics import KLD, OF_A_RUN, from_reference
from compare.results.records import PERPLEXITY
from compare.results.values import number
from compare.table import versus_columns


def row(comparison: Comparison, point: Point) -> dict[str, Any]:
    """Everything known of one point. `ppl` is its token perplexity, whatever metric is compared."""
    record, q, protocol = point.record, point.record.quantization, point.record.protocol
    return {
        "label": record.label,
        "layer_bpw": q.layer_bpw,
        "head_bpw": q.head_bpw,
        "vram_gb": q.vram_gb,
        "ppl": record.metric(f"{PERPLEXITY},none").value,
        "task": record.task,
        "metric": comparison.metric.key,
        "value": point.y,
        "stderr": point.stderr,
        "higher_is_better": comparison.metric.higher_is_better,
        "relative_to_reference": relative(comparison, point),
        "comparable": point.comparable,
        "group": point.group,
        "family": q.family,
        "scheme": q.scheme or None,
        "arithmetic": q.arithmetic if q.known and not record.is_reference else None,
        "file_bpw": q.file_bpw,
        "weight_bytes": q.weight_bytes,
        "layer_parameters": q.layer_parameters,
        "kv_bytes_per_token": q.kv_bytes_per_token,
        "kv_cache_dtype": q.kv_cache_dtype or None,
        **_mean(comparison, point),
        **_chosen(comparison, point),
        **_divergence(comparison, point),
        **versus_columns.fields(comparison, point),
        "engine": q.engine or None,
        "engine_version": q.engine_version or None,
        "kernel": q.kernel,
        "dtype": q.dtype or None,
        "device": q.device or None,
        "revision": q.revision or None,
        "scoring": q.scoring or None,
        **record.extra(),
        "protocol": protocol.name or None,
        "eval_len": protocol.eval_len,
        "stride": protocol.stride,
        "windows": protocol.windows,
        "scored_tokens": protocol.scored_tokens,
        "tokens_sha256": protocol.tokens_sha256,
        "text": protocol.text or None,
        "tokenizer": protocol.tokenizer or None,
        "model": record.model or None,
        "date": record.date,
        "file": str(record.file),
        "notes": list(q.notes),
    }


def relative(comparison: Comparison, point: Point) -> float | None:
    """value / reference - 1, the reference being of the same model size.

    None without a reference, for the reference itself, and for points kept apart.
    """
    reference = comparison.references.get(point.size)
    if reference is None or point is reference or not point.comparable or point.y is None or not reference.y:
        return None
    return number(point.y / reference.y - 1)


def _mean(comparison: Comparison, point: Point) -> dict[str, Any]:
    """What a mean is over, and the figure of every task, those left out of it too."""
    if not comparison.metric.averaged:
        return {}
    return {
        "averaged": [choice.label for choice in comparison.metric.averaged],
        "tasks": {
            part.choice.label: {"value": part.figure.value, "stderr": part.figure.stderr} for part in point.parts
        },
    }


def _divergence(comparison: Comparison, point: Point) -> dict[str, Any]:
    """What a figure comes of, where it comes of a reference; for the divergence all that a run says of it."""
    metric, found = comparison.metric, point.record.divergence
    if metric.averaged or not from_reference(metric.metric):
        return {}
    floor = comparison.noise_floor if point.comparable else None
    said: dict[str, Any] = {
        "reference": found.reference.label or None if found is not None else None,
        "reference_id": found.reference.id or None if found is not None else None,
        "reference_engine": found.reference.engine or None if found is not None else None,
        "role": found.role or None if found is not None else None,
        "noise_floor_low": floor.low if floor is not None else None,
        "noise_floor_high": floor.high if floor is not None else None,
    }
    if metric.metric == KLD:
        suffix = f",{metric.filter_name}" if metric.filter_name else ""
        for name in OF_A_RUN:
            figure = point.record.metric(f"{name}{suffix}")
            said |= {name: figure.value, f"{name}_stderr": figure.stderr}
    return said


def _chosen(comparison: Comparison, point: Point) -> dict[str, Any]:
    """What --pareto and --budget say of a point, where they were given."""
    chosen: dict[str, Any] = {}
    if comparison.options.pareto:
        chosen["pareto"] = on_frontier(comparison, point)
    if comparison.verdict is not None:
        budget, q = comparison.verdict.budget, point.record.quantization
        chosen["memory_bytes"] = memory_bytes(q, budget.context)
        chosen["fits"] = fit(q, budget).value
    return chosen


def on_frontier(comparison: Comparison, point: Point) -> bool | None:
    """Whether no other point dominates this one; None for points that take no part."""
    if not point.comparable or point.x is None or point.y is None:
        return None
    return id(point) in comparison.on_frontier
