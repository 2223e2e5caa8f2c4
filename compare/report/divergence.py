"""The report's section on divergence from a reference: plots, figures, and tables by the reference's confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.metrics import KLD
from compare.plot.captions import reference_of
from compare.plot.kind import PlotSettings
from compare.plot.pictures import DISTRIBUTIONS, distribution_kind
from compare.plot.series import arrange
from compare.report import content
from compare.report.pictures import PageFigure, interactive, palette, still
from compare.results.divergence import Bucket
from compare.text import and_more, metric_text

Say = Callable[[str], None]

MEANING = (
    (
        "KL divergence",
        "How far the model's probabilities of the next token are from the reference's, on average over all scored "
        "tokens: D(reference ‖ model) = Σ p ln(p / q), in nats; 0 is no difference.",
    ),
    (
        "Median, 99 %",
        "Half of the tokens, and all but one in a hundred, diverge by less. A mean is made by its worst tokens: a low "
        "median with a high 99 % is a model that is mostly right and sometimes far off.",
    ),
    ("Top-1 agreement", "The share of tokens for which model and reference find the same next token the most likely."),
    (
        "PPL ratio",
        "The perplexity divided by the reference's on the same tokens. Models of equal ratio may still disagree with "
        "the reference at different tokens, which the divergence shows.",
    ),
    (
        "Noise floor",
        "The divergence of full precision itself, by the rounding of the reference's own engine or in another engine. "
        "A model within it cannot be told from the reference.",
    ),
    (
        "By confidence",
        "Tokens sorted by the probability of the reference's most likely one. Where the reference is sure, a "
        "divergence changes what a user reads; where it hesitates, several continuations are about as good.",
    ),
)


@dataclass
class DivergenceSection:
    """One task's divergence. colours: those of its pictures (`pictures.palette`)."""

    lead: str
    scatter: list[PageFigure] = field(default_factory=list)
    tables: list[content.PageTable] = field(default_factory=list)
    distributions: list[PageFigure] = field(default_factory=list)
    by_confidence: list[content.PageTable] = field(default_factory=list)
    colours: dict[str, str] = field(default_factory=dict)


def section(comparison: Comparison, plotted: bool, log_y: bool | None, first: int, note: Say) -> DivergenceSection:
    """The section of one task; pictures are numbered from `first`. plotted: the page shows the means already."""
    result = DivergenceSection(_lead(comparison))
    if not plotted:
        drawing = arrange(comparison, log_y)
        for message in drawing.left_out:
            note(f"{comparison.metric.label}: {message}")
        if drawing.points:
            result.scatter.append(interactive(comparison, drawing, PlotSettings(), first, note))
            result.colours |= palette(drawing)
        result.tables = content.tables(comparison)
    of_divergence = [name for name in DISTRIBUTIONS if KLD in distribution_kind(name).metrics]
    for number, name in enumerate(of_divergence, first + 1):
        picture = distribution_kind(name)(comparison, PlotSettings())
        for message in picture.shown.left_out:
            note(f"{comparison.metric.label}: {message}")
        if picture.shown.points:
            result.distributions.append(still(picture, picture.shown.drawing, PlotSettings(), number, note))
            result.colours |= palette(picture.shown.drawing)
    result.by_confidence = _by_confidence(comparison)
    return result


def _lead(comparison: Comparison) -> str:
    sentences = [f"{comparison.metric.task}: how far each model is from the reference, {reference_of(comparison)}."]
    if comparison.noise_floor is not None:
        sentences.append(f"Noise floor: {comparison.noise_floor}.")
        inside = comparison.in_noise
        if inside:
            names = and_more([point.record.label for point in inside])
            sentences.append(f"Within it, and so not to be told from the reference: {names}.")
    return " ".join(sentences)


def _by_confidence(comparison: Comparison) -> list[content.PageTable]:
    """Mean divergence and top-1 agreement, a column per bucket; empty where no file has buckets."""
    rows = [(point, _buckets(point)) for point in comparison.points if point.comparable and _buckets(point)]
    bounds = sorted({(b.low, b.high) for _, buckets in rows for b in buckets.values()})
    if not rows:
        return []
    first = rows[0][1]
    total = sum(bucket.tokens for bucket in first.values()) or 1
    names = []
    for bound in bounds:
        share = f" ({first[bound].tokens / total:.0%} of tokens)" if bound in first else ""
        names.append(f"{bound[0]:g} to {bound[1]:g}{share}")

    def divergence(bucket: Bucket) -> tuple[str, float | None]:
        return metric_text(bucket.kld, bucket.kld_stderr), bucket.kld

    def agreement(bucket: Bucket) -> tuple[str, float | None]:
        return "–" if bucket.agreement is None else f"{bucket.agreement:.1%}", bucket.agreement

    return [
        content.PageTable(
            f"{name} by the reference's confidence, the probability of its most likely token",
            [content.Head("Model"), *(content.Head(text, True, best_first) for text in names)],
            [_row(point, [buckets.get(b) for b in bounds], cell) for point, buckets in rows],
        )
        for name, cell, best_first in (
            ("Mean KL divergence (nats)", divergence, False),
            ("Top-1 agreement", agreement, True),
        )
    ]


def _buckets(point: Point) -> dict[tuple[float, float], Bucket]:
    divergence = point.record.divergence
    return {(bucket.low, bucket.high): bucket for bucket in divergence.buckets} if divergence is not None else {}


def _row(
    point: Point, buckets: list[Bucket | None], cell: Callable[[Bucket], tuple[str, float | None]]
) -> content.PageRow:
    cells = []
    for bucket in buckets:
        text, value = cell(bucket) if bucket is not None else ("–", None)
        cells.append(content.Cell(text, content.sort_key(value)))
    return content.PageRow(point.record.label, content.family_colour(point), cells)
