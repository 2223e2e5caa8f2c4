"""The report's section on divergence from a reference: plots, figures, and the table by the reference's confidence."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from compare.comparison.comparison import Comparison
from compare.comparison.point import Point
from compare.families import family_style
from compare.plot import distributions
from compare.plot.captions import reference_of
from compare.plot.figure import PlotSettings
from compare.plot.pictures import histogram, spread
from compare.plot.series import arrange
from compare.report import content
from compare.report.pictures import colour_variable, palette, picture, still
from compare.results.divergence import Bucket
from compare.text import and_more, metric_text

Say = Callable[[str], None]

_MEANING = (
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


def section(
    comparison: Comparison, plotted: bool, log_y: bool | None, first: int, note: Say
) -> tuple[str, dict[str, str]]:
    """Markup and colours; pictures are numbered from `first`. plotted: the page shows the means already."""
    parts = [_lead(comparison)]
    colours: dict[str, str] = {}
    if not plotted:
        drawing = arrange(comparison, log_y)
        for message in drawing.left_out:
            note(f"{comparison.metric.label}: {message}")
        if drawing.points:
            parts.append(picture(comparison, drawing, PlotSettings(), first, note))
            colours |= palette(drawing)
        parts.append(content.tables(comparison))
    for number, (find, draw) in enumerate(_PICTURES, first + 1):
        found = find(comparison)
        for message in found.left_out:
            note(f"{comparison.metric.label}: {message}")
        if found.points:
            shown = draw(comparison, found, PlotSettings())
            parts.append(still(shown, found.drawing, PlotSettings(), number, note))
            colours |= palette(found.drawing)
    parts.append(_by_confidence(comparison))
    parts.append(content.pairs(_MEANING, "families"))
    return "".join(parts), colours


_PICTURES = (
    (distributions.boxes, lambda comparison, found, settings: spread.picture(comparison, found, settings, True)),
    (
        distributions.histograms,
        lambda comparison, found, settings: histogram.picture(comparison, found, settings, False),
    ),
)


def _lead(comparison: Comparison) -> str:
    said = [f"{comparison.metric.task}: how far each model is from the reference, {reference_of(comparison)}."]
    if comparison.noise_floor is not None:
        said.append(f"Noise floor: {comparison.noise_floor}.")
        inside = comparison.in_noise
        if inside:
            names = and_more([point.record.label for point in inside])
            said.append(f"Within it, and so not to be told from the reference: {names}.")
    return f"<p>{escape(' '.join(said))}</p>"


def _by_confidence(comparison: Comparison) -> str:
    """Two tables, a column a bucket: mean divergence and top-1 agreement; empty where no file has buckets."""
    rows = [(point, _buckets(point)) for point in comparison.points if point.comparable and _buckets(point)]
    bounds = sorted({(b.low, b.high) for _, buckets in rows for b in buckets.values()})
    if not rows:
        return ""
    first = rows[0][1]
    total = sum(bucket.tokens for bucket in first.values()) or 1
    heads = []
    for bound in bounds:
        share = f" ({first[bound].tokens / total:.0%} of tokens)" if bound in first else ""
        heads.append(f"{bound[0]:g} to {bound[1]:g}{share}")

    def divergence(bucket: Bucket) -> tuple[str, float | None]:
        return metric_text(bucket.kld, bucket.kld_stderr), bucket.kld

    def agreement(bucket: Bucket) -> tuple[str, float | None]:
        return "–" if bucket.agreement is None else f"{bucket.agreement:.1%}", bucket.agreement

    found = ""
    for name, cell, best_first in (
        ("Mean KL divergence (nats)", divergence, False),
        ("Top-1 agreement", agreement, True),
    ):
        caption = f"{name} by the reference's confidence, the probability of its most likely token"
        body = "".join(_row(point, [buckets.get(b) for b in bounds], cell) for point, buckets in rows)
        way = ' data-first="descending"' if best_first else ""
        headings = '<th scope="col"><button type="button">Model</button></th>' + "".join(
            f'<th scope="col" class="right"{way}><button type="button">{escape(head)}</button></th>' for head in heads
        )
        found += (
            f'<p class="caption">{escape(caption)}</p><div class="scroll"><table class="sortable">'
            f"<thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return found


def _buckets(point: Point) -> dict[tuple[float, float], Bucket]:
    found = point.record.divergence
    return {(bucket.low, bucket.high): bucket for bucket in found.buckets} if found is not None else {}


def _row(point: Point, buckets: list[Bucket | None], cell: Callable[[Bucket], tuple[str, float | None]]) -> str:
    colour = colour_variable(family_style(point.record.quantization.family).light)
    cells = ""
    for bucket in buckets:
        text, value = cell(bucket) if bucket is not None else ("–", None)
        cells += f'<td class="right" data-v="{"" if value is None else repr(value)}">{escape(text)}</td>'
    return f'<tr><th scope="row"><i style="background: {colour}"></i>{escape(point.record.label)}</th>{cells}</tr>'
