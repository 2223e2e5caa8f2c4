"""The texts of a picture: title, subtitle, caption, and the description for those who cannot see it."""

from __future__ import annotations

from dataclasses import dataclass

from compare.comparison.best import BudgetVerdict
from compare.comparison.comparison import Comparison
from compare.comparison.noise_floor import NoiseFloor
from compare.comparison.point import Point, caveats, stated_by
from compare.metrics import needs_reference
from compare.plot.series import Drawing
from compare.results.records import ProtocolRecord
from compare.text import and_more, clean, metric_text

WEIGHT_ONLY_MARK = " †"


def title_of(comparison: Comparison, title: str | None) -> str:
    """The title the user gave, or the metric by the axis."""
    return clean(title) if title else f"{comparison.metric.name} by {comparison.axis.short}"


@dataclass(frozen=True)
class Texts:
    """The texts around the axes."""

    title: str
    subtitle: str
    caption: list[str]


def texts(comparison: Comparison, drawing: Drawing, title: str | None) -> Texts:
    return Texts(title_of(comparison, title), subtitle(comparison), caption(comparison, drawing))


def subtitle(comparison: Comparison) -> str:
    """Data set, windows × length, stride, protocol, reference; the task where the text is not known."""
    if comparison.metric.averaged:
        return "  ·  ".join(choice.label for choice in comparison.metric.averaged)
    protocol, metric = comparison.protocol, comparison.metric
    filtered = "" if metric.filter_name in ("", "none") else metric.filter_name
    against = f"reference: {reference_of(comparison)}" if needs_reference(metric.metric) else ""
    return "  ·  ".join(filter(None, (protocol.text or metric.task, filtered, *settings_of(protocol), against)))


def reference_of(comparison: Comparison) -> str:
    """The stored reference of the comparable points: ``BF16 in vllm 0.26.0 (bfloat16), 1a2b3c4d``."""
    divergence = next((p.record.divergence for p in comparison.points if p.comparable and p.record.divergence), None)
    return divergence.reference.describe() if divergence is not None else "not named"


def settings_of(protocol: ProtocolRecord) -> list[str]:
    """Windows × length, stride, protocol; for other tasks their version, samples, shots."""
    parts = []
    if protocol.windows and protocol.eval_len:
        parts.append(f"{protocol.windows:,} windows × {protocol.eval_len:,} tokens")
    if protocol.stride:
        parts.append(f"stride {protocol.stride}")
    if protocol.name:
        parts.append(f"{protocol.name} protocol")
    elif not protocol.tokens_sha256:
        parts += protocol.harness
    return parts


def caption(comparison: Comparison, drawing: Drawing, alone: bool = True) -> list[str]:
    """What the marks in the picture mean, one statement per line.

    A picture that is not `alone` is a panel of several: a statement about one metric names it, and the verdict on the
    budget stands elsewhere.
    """
    lines = []
    shown = drawing.points + drawing.references
    if any(point.stderr for point in shown):
        paired = "all models are scored on the same tokens, so differences are surer than the bars suggest"
        independent = ", the tasks taken as independent" if comparison.metric.averaged else ""
        more = f"; {paired}" if _all_paired(comparison) else independent
        lines.append(f"Error bars: ± 1 standard error{more}.")
    if any(not point.comparable for point in drawing.points):
        other = "from another reference or " if needs_reference(comparison.metric.metric) else ""
        lines.append(
            f"Hollow: {other}scored on other tokens or samples or by another protocol, not comparable with the rest."
        )
    lines += mixed(comparison)
    lines += [f"{line}." for line in caveats(shown)]
    lines += [f"Dashed: {p.record.label}{stated_by(p)}." for p in drawing.references if stated_by(p)]
    broken = [point.record.label for point in shown if point.record.not_numbers]
    if broken:
        lines.append(f"Not to be trusted, another figure of the model is NaN or infinite: {and_more(broken)}.")
    if drawing.noise_floor is not None:
        lines += _floor(comparison, drawing.noise_floor, "" if alone else f"{comparison.metric.label}: ")
    if comparison.options.pareto:
        lines.append(
            "Steps: the Pareto frontier. Grey: another model is no larger and no worse, and better in one of the two."
        )
    if alone and comparison.verdict is not None:
        lines += _verdict(comparison, comparison.verdict)
    if any(point.record.quantization.runs_other_than_named for point in drawing.points):
        lines.append("† checkpoint with quantized activations, run weight-only: not what the format gives.")
    return lines


def mixed(comparison: Comparison) -> list[str]:
    """With --allow-mixed: the models to which the subtitle does not apply."""
    if not comparison.mixed_in:
        return []
    other = "from another reference or " if needs_reference(comparison.metric.metric) else ""
    names = and_more([p.record.label for p in comparison.mixed_in])
    return [f"Mixed as asked, {other}over other tokens or samples than named above: {names}."]


def _floor(comparison: Comparison, floor: NoiseFloor, prefix: str) -> list[str]:
    """What the band is, and which models lie in it; as a number too, since it may be too thin to be seen."""
    lines = ["Shaded: the noise floor, by how much full precision differs from the reference"]
    lines[0] += f"{'' if prefix else f', {floor.range}'}: {floor.source_names}."
    inside = comparison.in_noise
    if inside:
        names = and_more([p.record.label for p in inside])
        lines.append(
            f"{prefix}{'within' if prefix else 'Within'} the noise floor, so perhaps no more than that: {names}."
        )
    return lines


def _verdict(comparison: Comparison, verdict: BudgetVerdict) -> list[str]:
    headline = verdict.headline(comparison.metric)
    lines = [f"{headline[0].upper()}{headline[1:]}."]
    if verdict.best is not None:
        lines.append(f"It needs {verdict.need()}; activations and the engine's buffers come on top.")
    if verdict.unknown:
        lines.append(f"Unknown whether they fit: {and_more([p.record.label for p in verdict.unknown])}.")
    return lines


def _all_paired(comparison: Comparison) -> bool:
    return comparison.protocol.tokens_sha256 is not None and all(point.comparable for point in comparison.points)


def y_label(comparison: Comparison) -> str:
    """The metric's name with its direction: ``Perplexity (lower is better)``."""
    name = comparison.metric.name
    better = {True: "higher is better", False: "lower is better", None: ""}[comparison.metric.higher_is_better]
    if not better:
        return name
    return f"{name[:-1]}; {better})" if name.endswith(")") else f"{name} ({better})"


def point_label(point: Point, family_known: bool) -> str:
    """The label, without the family's name in front where the legend shows the family."""
    label, family = point.record.label, point.record.quantization.family
    if family_known and label.lower().startswith(family.lower()):
        rest = label[len(family) :]
        if rest[:1] in (" ", "-", "_", ":") and rest.strip(" -_:"):
            label = rest.strip(" -_:")
    return label


def alternative_text(comparison: Comparison, drawing: Drawing, limit: int = 200) -> str:
    """The picture in words, for screen readers and search: stored in the file."""
    points = [f"{p.record.label}: {p.x:.4g}, {metric_text(p.y)}" for p in drawing.points[:limit]]
    references = [f"{p.record.label} (reference line): {metric_text(p.y)}" for p in drawing.references[:limit]]
    floor = f" Noise floor: {drawing.noise_floor}." if drawing.noise_floor is not None else ""
    return f"{comparison.metric.name} against {comparison.axis.name}. {'; '.join(references + points)}.{floor}"
