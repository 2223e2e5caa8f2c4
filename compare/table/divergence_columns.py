"""What stands beside a divergence: how it is spread, how often the first choice is the same, what is noise."""

from __future__ import annotations

from collections.abc import Iterator

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.metrics import KLD, from_reference
from compare.table.column import Column
from compare.text import metric_text

_BESIDE_KLD = (
    ("Median", "kld_median"),
    ("99 %", "kld_p99"),
    ("Top-1 agreement", "top1_agreement"),
    ("PPL ratio", "ppl_ratio"),
)


def columns(comparison: Comparison) -> Iterator[Column]:
    """Columns for a figure that comes of a reference; those of which no file says anything are left out later."""
    metric = comparison.metric
    if metric.averaged or not from_reference(metric.metric):
        return
    if metric.metric == KLD:
        for heading, name in _BESIDE_KLD:
            yield _figure(heading, f"{name},{metric.filter_name}" if metric.filter_name else name)
    if comparison.noise_floor is not None:
        floor, inside = {id(p) for p in comparison.noise_floor.points}, {id(p) for p in comparison.in_noise}
        yield Column("Noise", lambda _, p: "floor" if id(p) in floor else "within" if id(p) in inside else "")


def _figure(heading: str, key: str) -> Column:
    def text(_: Comparison, point: Point) -> str:
        figure = point.record.metrics.get(key)
        return metric_text(figure.value) if figure is not None else ""  # without errors: JSON has them, a row no room

    return Column(heading, text, lambda _, point: point.record.metric(key).value)
