"""Records to comparisons: one metric, one axis, and which results may be compared.

Two figures are comparable only if they are over the same tokens under the same protocol, or of the same task with the
same settings; a divergence only if it is also from the same reference (`Record.comparability`). The largest such group
is the comparison; the other points are kept apart: listed and drawn, but never joined or ranked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from compare.comparison.axis import Axis, axis_of
from compare.comparison.broken import mark_broken, warnings
from compare.comparison.chosen_metric import ChosenMetric, choose_metrics
from compare.comparison.comparison import Comparison, Options
from compare.comparison.labels import find_label
from compare.comparison.mean import Part, average
from compare.comparison.model_sizes import model_clusters, model_text
from compare.comparison.point import Point
from compare.comparison.reruns import distinct_labels, newest
from compare.comparison.task_hashes import settle_hashes
from compare.errors import NOTHING_USABLE, CompareError
from compare.families import family_order
from compare.results.records import Record
from compare.text import and_more, shorten


def build_comparison(records: list[Record], options: Options) -> Comparison:
    """The comparison of a single metric, or of a mean. Raises CompareError as `build_comparisons` does."""
    (comparison,) = build_comparisons(records, options)
    return comparison


def build_comparisons(records: list[Record], options: Options) -> list[Comparison]:
    """Settles re-runs, applies the options, groups comparable results: one comparison per metric, or one of their mean.

    Raises CompareError when a metric is unknown or ambiguous, or nothing is left to show.
    """
    records, notices = newest(records, across_settings=options.mean)
    records = mark_broken(records)
    records = distinct_labels(records, across_tasks=options.mean)
    records = settle_hashes(_masked(records, options.mask, notices))
    records = _with_baseline(records, options.baseline)
    metrics = choose_metrics(records, options.metrics, options.subtasks, notices)
    axis = axis_of(options.axis, options.context)
    if options.mean:
        metric, models = average(records, metrics, notices)
        points = [_point(m.record, metric, axis, m.parts) for m in models]
        return [_comparison(points, metric, axis, options, notices)]
    comparisons = []
    for metric in metrics:
        points = [_point(r, metric, axis) for r in records if r.task == metric.task and metric.key in r.metrics]
        own_notices: list[str] = []
        comparisons.append(_comparison(points, metric, axis, options, own_notices))
        notices += own_notices if len(metrics) == 1 else [f"{metric.label}: {notice}" for notice in own_notices]
    for comparison in comparisons:
        comparison.notices = notices if comparison is comparisons[0] else []  # each notice is shown once
    return comparisons


def _point(record: Record, metric: ChosenMetric, axis: Axis, parts: tuple[Part, ...] = ()) -> Point:
    figure = record.metric(metric.key)
    return Point(record, axis.value(record), figure.value, figure.stderr, parts=parts)


def _comparison(
    points: list[Point], metric: ChosenMetric, axis: Axis, options: Options, notices: list[str]
) -> Comparison:
    if metric.higher_is_better is None and (options.pareto or options.budget is not None):
        raise CompareError(
            f"these files do not say whether a higher {shorten(metric.short, 120)} is better, which --pareto and "
            "--budget need"
        )
    points = _within_limits(points, options, notices)
    if not points:
        raise CompareError("nothing left to show: --max-x or --max-y leaves out every point", NOTHING_USABLE)
    points = _grouped(points, metric, options.allow_mixed, notices)
    points = _sized(points, notices)
    notices += warnings(points)
    points.sort(key=_sort_key(options.sort, metric))
    comparison = Comparison(metric, axis, points, notices, options)
    notices += _about_baseline(comparison)
    if comparison.in_noise:
        names = and_more([point.record.label for point in comparison.in_noise])
        notices.append(
            f"within the noise floor, {comparison.noise_floor}: {names}: such a difference may be noise alone"
        )
    return comparison


def _masked(records: list[Record], mask: str | None, notices: list[str]) -> list[Record]:
    """The records whose label contains one of the strings of --mask. Raises CompareError if there are none."""
    parts = [part.strip().casefold() for part in (mask or "").split(";") if part.strip()]
    if not parts:
        return records
    kept = [record for record in records if any(part in record.label.casefold() for part in parts)]
    if not kept:
        labels = and_more(sorted({record.label for record in records}))
        raise CompareError(f"--mask {mask}: no label contains any of these; labels: {labels}", NOTHING_USABLE)
    if len(kept) < len(records):
        notices.append(f"--mask keeps {len(kept)} of {len(records)} results")
    return kept


def _with_baseline(records: list[Record], label: str | None) -> list[Record]:
    """The records, those of the model called `label` as the baseline. Raises CompareError if there is none."""
    if label is None:
        return records
    found = find_label(list(dict.fromkeys(record.label for record in records)), label, "--baseline")
    return [replace(r, baseline_by="--baseline") if r.label == found else r for r in records]


def _about_baseline(comparison: Comparison) -> Iterator[str]:
    """Lines on a baseline that looks quantized, and on stock models that may be the baseline that is missing."""
    if comparison.metric.row.needs_reference:
        if comparison.options.baseline is not None:
            yield f"note: --baseline changes nothing for {comparison.metric.label}: it is against a stored reference"
        return
    for point in comparison.baselines.values():
        q = point.record.quantization
        if point.record.baseline_by and q.looks_quantized:
            yield f"warning: the baseline {point.record.label} looks quantized: {'; '.join(q.caveats)}"
    stock = [p.record for p in comparison.points if p.comparable and not p.record.quantization.known]
    possible = [record.label for record in stock if not record.quantization.looks_quantized]
    if not comparison.baselines and possible and len(comparison.points) > 1:
        yield (
            f"note: no result says that it is in full precision; if {and_more(possible, 4)} "
            f"{'is' if len(possible) == 1 else 'or another one is'}, --baseline LABEL compares the others with it"
        )


def _within_limits(points: list[Point], options: Options, notices: list[str]) -> list[Point]:
    """The points within --max-x and --max-y; a baseline is a line, so --max-x does not apply to it."""
    kept = []
    for point in points:
        beyond = _beyond("x", point.x, options.max_x) or _beyond("y", point.y, options.max_y)
        if beyond and not (point.record.is_baseline and beyond.startswith("x")):
            notices.append(f"left out: {point.record.label}: {beyond}")
        else:
            kept.append(point)
    return kept


def _beyond(name: str, value: float | None, limit: float | None) -> str:
    """The reason to leave a point out; empty if it is within the limit."""
    if limit is None or value is None or value <= limit:
        return ""
    return f"{name} = {value:.6g} is above --max-{name} {limit:g}"


def _grouped(points: list[Point], metric: ChosenMetric, allow_mixed: bool, notices: list[str]) -> list[Point]:
    """Numbers the groups of comparable points: the largest is 0; of equally large ones, one that has a baseline."""
    keys = [point.record.comparability(metric.metric) for point in points]
    sizes = Counter(keys)
    with_baseline = {key for key, point in zip(keys, points, strict=True) if point.record.is_baseline}
    order = sorted(sizes, key=lambda key: (-sizes[key], key not in with_baseline, key))
    if len(order) == 1:
        return points
    over = _differing(points, metric)
    for number, key in enumerate(order):
        members = [point.record for point, own in zip(points, keys, strict=True) if own == key]
        which = members[0].scored_on(metric.metric)
        names = and_more([record.label for record in members], limit=8 if number == 0 else 50)
        if allow_mixed:
            notices.append(f"warning: mixed as asked (--allow-mixed): {which}: {names}")
        elif number == 0:
            notices.append(f"warning: not all results are {over}; compared: {which}: {names}")
        else:
            notices.append(f"warning: kept apart, not comparable (--allow-mixed overrides): {which}: {names}")
    if allow_mixed:
        return points
    return [replace(point, group=order.index(key)) for point, key in zip(points, keys, strict=True)]


def _differing(points: list[Point], metric: ChosenMetric) -> str:
    """What the points do not all share: ``over the same tokens``, ``with the same settings``."""
    protocols = [point.record.protocol for point in points]
    if metric.row.needs_reference and len({protocol.fingerprint for protocol in protocols}) == 1:
        return "against the same reference"
    return "over the same tokens" if any(p.has_windows for p in protocols) else "with the same settings"


def _sized(points: list[Point], notices: list[str]) -> list[Point]:
    """Numbers the models by size and architecture; `notices` names the results of each, if there are several."""
    numbers = model_clusters([point.record for point in points])
    points = [replace(point, size=number) for point, number in zip(points, numbers, strict=True)]
    sizes = sorted({p.size for p in points if p.comparable}, key=lambda size: (size is None, size or 0))
    if len(sizes) > 1:
        notices.append(
            "warning: models of different size or architecture: no line joins them, each has a baseline of its own"
        )
        for size in sizes:
            records = [p.record for p in points if p.comparable and p.size == size]
            notices.append(f"warning: {model_text(records)}: {and_more([r.label for r in records])}")
    return points


SORTS = ("family", "x", "metric", "label")


def _sort_key(sort: str, metric: ChosenMetric) -> Callable[[Point], tuple[object, ...]]:
    def missing_last(value: float | None, sign: int = 1) -> tuple[bool, float]:
        return (value is None, 0.0 if value is None else sign * value)

    def key(point: Point) -> tuple[object, ...]:
        by_x = missing_last(point.x)
        by_metric = missing_last(point.y, -1 if metric.higher_is_better else 1)
        first: dict[str, tuple[object, ...]] = {
            "family": (*family_order(point.record.quantization.family), by_x),
            "x": by_x,
            "metric": by_metric,
            "label": (point.record.label.casefold(),),
        }
        return (point.group, *first[sort], by_x, by_metric, point.record.label, str(point.record.file))

    return key
