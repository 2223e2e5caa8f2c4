"""The divergence of each part of a quantized model, the others being the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lmeval_ext import metrics
from lmeval_ext.attribution.parts import Part
from lmeval_ext.divergence.summary import WindowDivergence
from lmeval_ext.requests import WindowRequest


@dataclass(frozen=True)
class Cost:
    """Mean D_KL(reference ‖ model) in nats per token with its standard error; None as in `metrics`."""

    kld: float | None
    stderr: float | None


@dataclass(frozen=True)
class Attribution:
    """base: the original against the reference; whole: all matrices exchanged; parts: each part exchanged alone."""

    base: Cost
    whole: Cost
    parts: list[Cost]

    @property
    def additivity(self) -> float | None:
        """Σ (part − base) / (whole − base): 1 if the parts' costs add up; None where a cost is unknown."""
        values = [cost.kld for cost in (self.base, self.whole, *self.parts)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        base, whole, *parts = known
        return math.fsum(part - base for part in parts) / (whole - base) if whole != base else None


def attribute(
    model: Any,
    weights: Mapping[str, torch.Tensor],
    parts: Sequence[Part],
    windows: Sequence[WindowRequest],
    block_windows: int,
) -> Attribution:
    """Measures every part. model: an `hf_quant` of the original with reference=; it is as before afterwards.

    weights: dense quantized weights by name (`weights.changed_matrices`). block_windows: windows that share tokens.
    """
    everything = Part("all", tuple(weights), None, None)
    runs = (Part("none", (), None, None), everything, *parts)
    with tqdm(total=len(runs) * len(windows), desc="Measuring parts", unit="window") as bar:
        model.bar = bar
        try:
            costs = [_cost(model, weights, part, windows, block_windows) for part in runs]
        finally:
            model.bar = None
    return Attribution(costs[0], costs[1], costs[2:])


def _cost(
    model: Any, weights: Mapping[str, torch.Tensor], part: Part, windows: Sequence[WindowRequest], block_windows: int
) -> Cost:
    kept = {}
    try:
        for name in part.matrices:
            parameter = model.model.get_parameter(name)
            kept[name] = parameter.detach().clone()
            _set(parameter, weights[name])
        scores = model.score_checked(windows)
    finally:
        for name, tensor in kept.items():
            _set(model.model.get_parameter(name), tensor)
    sums = [WindowDivergence.of(i, s.divergence or {}).sums()["kld"] for i, s in enumerate(scores)]
    return Cost(metrics.token_mean(sums), metrics.standard_error(sums, metrics.token_mean, block_windows))


@torch.no_grad()
def _set(parameter: torch.Tensor, values: torch.Tensor) -> None:
    parameter.copy_(values)
