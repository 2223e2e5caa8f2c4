"""The columns beside a divergence: its spread, the agreement of the first choices, and the noise floor."""

from __future__ import annotations

from collections.abc import Iterator

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.metrics import KLD, beside_kld
from compare.table.column import Column
from compare.text import metric_text


def columns(comparison: Comparison) -> Iterator[Column]:
    """Columns for a metric that needs a reference; a table leaves out those that no file has a value for."""
    metric = comparison.metric
    if metric.averaged or not metric.row.needs_reference:
        return
    if metric.metric == KLD:
        for other in beside_kld():
            if other.column:
                key = f"{other.name},{metric.filter_name}" if metric.filter_name else other.name
                yield _metric_column(other.column, key)
    if comparison.noise_floor is not None:
        floor, inside = {id(p) for p in comparison.noise_floor.points}, {id(p) for p in comparison.in_noise}
        yield Column("Noise", lambda _, p: "floor" if id(p) in floor else "within" if id(p) in inside else "")


def _metric_column(heading: str, key: str) -> Column:
    def text(_: Comparison, point: Point) -> str:
        figure = point.record.metrics.get(key)
        return metric_text(figure.value) if figure is not None else ""  # errors only in JSON: no room in a row

    return Column(heading, text, lambda _, point: point.record.metric(key).value)
