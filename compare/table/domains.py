"""The table of ``compare domains``: a row a model, a column a domain, the worst domain of each model marked."""

from __future__ import annotations

import json
import math
from typing import Any

from compare.comparison.domains import Domains, Loss
from compare.text import and_more, markdown

WORST, NOISE = "▲", "≈"


def render_markdown(domains: Domains) -> str:
    """Losses in the unit of the metric; below, what the marks mean and whether the domains agree."""
    first = domains.comparisons[0]
    unit = domains.scales[0].unit.strip()
    over = first.points[0].record.protocol.describe()
    heading = f"Loss by {first.metric.name}{f', {unit}' if unit and unit not in first.metric.name else ''}: {over}"
    lines = [markdown(heading), "", f"| Model | Family | bpw | {' | '.join(map(markdown, domains.names))} |"]
    lines.append(f"|---|---|---:|{'---:|' * len(domains.names)}")
    for model in domains.models:
        bpw = "–" if model.bpw is None else f"{model.bpw:.3f}"
        cells = [cell(loss, number == model.worst) for number, loss in enumerate(model.losses)]
        lines.append(f"| {markdown(model.label)} | {markdown(model.family)} | {bpw} | {' | '.join(cells)} |")
    floors = domains.floors()
    if any(floor is not None for floor in floors):
        cells = ["–" if floor is None else f"{floor:.3g}" for floor in floors]
        lines.append(f"| noise floor | | | {' | '.join(cells)} |")
    for sentence in sentences(domains):
        lines += ["", markdown(sentence)]
    return "\n".join(lines) + "\n"


def cell(loss: Loss, worst: bool) -> str:
    """The loss with its error and marks."""
    if loss.value is None:
        return "–"
    error = "" if loss.error is None else f" ± {loss.error:.2g}"
    return f"{loss.value:.3g}{error}{f' {NOISE}' if loss.in_noise else ''}{f' {WORST}' if worst else ''}"


def sentences(domains: Domains) -> list[str]:
    """What the table says together."""
    found = [f"{WORST}: the domain in which a model loses most. {NOISE}: within the noise floor of that domain."]
    agreement = domains.agreement
    if agreement:
        mean = math.fsum(pair.tau for pair in agreement) / len(agreement)
        low = agreement[0]
        found.append(
            f"Order of the models: Kendall's τ between two domains is {mean:.2f} on average of {len(agreement)} pairs, "
            f"lowest {low.tau:.2f} ({low.first} and {low.second}, {low.models} models)."
        )
    else:
        found.append("Too few models in two domains to say whether these order the models alike.")
    apart = sorted({p.record.label for c in domains.comparisons for p in c.points if not p.comparable})
    if apart:
        found.append(f"Not comparable in some domain, and left out there: {and_more(apart)}.")
    return found


def render_json(domains: Domains) -> str:
    """All figures: losses by domain, floors, agreement."""
    content: dict[str, Any] = {
        "metric": domains.comparisons[0].metric.short,
        "unit": domains.scales[0].unit.strip(),
        "domains": domains.names,
        "noise_floors": domains.floors(),
        "models": [
            {
                "label": model.label, "family": model.family, "layer_bpw": model.bpw,
                "losses": {name: {"value": loss.value, "stderr": loss.error, "in_noise": loss.in_noise}
                           for name, loss in zip(domains.names, model.losses, strict=True)},
                "worst": None if model.worst is None else domains.names[model.worst],
            }
            for model in domains.models
        ],
        "agreement": [
            {"first": pair.first, "second": pair.second, "kendall_tau": pair.tau, "models": pair.models}
            for pair in domains.agreement
        ],
    }  # fmt: skip
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
