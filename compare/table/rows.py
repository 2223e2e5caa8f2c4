"""Everything known about a point, at full precision: the records of the JSON and CSV tables."""

from __future__ import annotations

from typing import Any

from compare.comparison.comparison import Comparison
from compare.comparison.memory import fit, longest_context, memory_bytes
from compare.comparison.point import Point
from compare.metrics import KLD, PERPLEXITY, beside_kld
from compare.results.values import number
from compare.table import pair_columns, position_columns


def row(comparison: Comparison, point: Point) -> dict[str, Any]:
    """Everything known about a point. `ppl` is its token perplexity, whatever metric is compared."""
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
        **_baseline(comparison, point),
        "not_numbers": list(record.not_numbers),
        "comparable": point.comparable,
        "group": point.group,
        "family": q.family,
        "scheme": q.scheme or None,
        "arithmetic": q.arithmetic if q.known and not record.is_baseline else None,
        "file_bpw": q.file_bpw,
        "weight_bytes": q.weight_bytes,
        "draft_bytes": q.draft_bytes,
        "layer_parameters": q.layer_parameters,
        "kv_bytes_per_token": q.kv_bytes_per_token,
        "kv_cache_dtype": q.kv_cache_dtype or None,
        **_mean(comparison, point),
        **_best(comparison, point),
        **_divergence(comparison, point),
        **pair_columns.fields(comparison, point),
        **position_columns.fields(comparison, point),
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
        "caveats": list(q.caveats),
    }


def _baseline(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The model that a point is compared with, and who says that it is the baseline: None where its own file does."""
    baseline = comparison.baselines.get(point.size) if point.comparable else None
    record = baseline.record if baseline is not None else None
    return {
        "baseline": record.label if record is not None else None,
        "baseline_by": record.baseline_by or None if record is not None else None,
    }


def relative(comparison: Comparison, point: Point) -> float | None:
    """value / baseline − 1, with the baseline of the same model size.

    None without a baseline, for the baseline itself, and for points kept apart.
    """
    baseline = comparison.baselines.get(point.size)
    if baseline is None or point is baseline or not point.comparable or point.y is None or not baseline.y:
        return None
    return number(point.y / baseline.y - 1)


def _mean(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The tasks of a mean, and the figure of every task, including those left out of the mean."""
    if not comparison.metric.averaged:
        return {}
    return {
        "averaged": [metric.label for metric in comparison.metric.averaged],
        "tasks": {
            part.metric.label: {"value": part.figure.value, "stderr": part.figure.stderr} for part in point.parts
        },
    }


def _divergence(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The reference and the noise floor of a metric that needs a reference; for the KL divergence also its spread."""
    metric, divergence = comparison.metric, point.record.divergence
    if metric.averaged or not metric.row.needs_reference:
        return {}
    floor = comparison.noise_floor if point.comparable else None
    fields: dict[str, Any] = {
        "reference": divergence.reference.label or None if divergence is not None else None,
        "reference_id": divergence.reference.id or None if divergence is not None else None,
        "reference_engine": divergence.reference.engine or None if divergence is not None else None,
        "role": divergence.role or None if divergence is not None else None,
        "noise_floor_low": floor.low if floor is not None else None,
        "noise_floor_high": floor.high if floor is not None else None,
    }
    if metric.metric == KLD:
        suffix = f",{metric.filter_name}" if metric.filter_name else ""
        for other in beside_kld():
            figure = point.record.metric(f"{other.name}{suffix}")
            fields |= {other.name: figure.value, f"{other.name}_stderr": figure.stderr}
    return fields


def _best(comparison: Comparison, point: Point) -> dict[str, Any]:
    """The results of --pareto and --budget for a point, where they were given."""
    fields: dict[str, Any] = {}
    if comparison.options.pareto:
        fields["pareto"] = on_frontier(comparison, point)
    if comparison.verdict is not None:
        budget, q = comparison.verdict.budget, point.record.quantization
        fields["memory_bytes"] = memory_bytes(q, budget.context)
        fields["fits"] = fit(q, budget).value
        room = longest_context(q, budget.gib)
        fields["longest_context"] = room.tokens if room is not None else None
        fields["longest_context_is"] = None if room is None else room.kind
    return fields


def on_frontier(comparison: Comparison, point: Point) -> bool | None:
    """Whether no other point dominates this one; None for points that are not ranked."""
    if not point.comparable or point.x is None or point.y is None:
        return None
    return id(point) in comparison.on_frontier
