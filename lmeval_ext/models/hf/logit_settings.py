"""What a model does to the product of its output matrix, measured: Cohere scales it, Gemma caps it.

Config fields say it under many names, with several meanings (Granite divides by `logits_scaling`, HyperCLOVA X
multiplies by it, MiniCPM 3 has divided the hidden states by it), and some models ignore theirs. So the output of the
matrix is replaced by known numbers in one forward, and what comes out is compared with scale × cap × tanh(x / cap).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

# Config fields of Transformers' models for a factor or cap of the logits, for what they do ignore
DECLARED = (
    "final_logit_softcapping",  # Gemma 2, 3, 3n, 4, VaultGemma, T5Gemma, NanoChat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
    "logit_scale",  # Cohere, MPT
    "logits_scaling",  # Granite, HyperCLOVA X, MiniCPM 3
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
BEFORE_THE_MATRIX = ("minicpm3",)  # model types that apply their factor to the hidden states
_SMALL, _LARGE = 1e-3, 1e4  # of the numbers that replace the matrix' output
_TOLERANCE = 1e-5  # relative; float32 arithmetic of a division, a tanh and two products


@dataclass(frozen=True)
class LogitSettings:
    """logits = scale × cap × tanh(x / cap), x being the output of the matrix; without a softcap, scale × x.

    columns: number of logits per token, without padding that the model cuts off.
    """

    softcap: float | None
    scale: float
    columns: int

    @property
    def neutral(self) -> bool:
        return self.softcap is None and self.scale == 1.0

    def applied(self, products: torch.Tensor) -> torch.Tensor:
        """The logits of products of the output matrix, [..., ≥ columns]."""
        logits = products[..., : self.columns]
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale


@dataclass
class Replaced:
    """Numbers in place of the output matrix' products, [rows, positions, vocabulary]; None if it never ran."""

    numbers: torch.Tensor | None = field(default=None)


@contextlib.contextmanager
def replaced_products(layer: torch.nn.Module) -> Iterator[Replaced]:
    """Replaces what the layer returns by numbers between 1e-3 and 1e4 of both signs, float32."""
    replaced = Replaced()

    def replace(_: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        columns = output.shape[-1]
        magnitudes = torch.logspace(-3, 4, columns, dtype=torch.float32, device=output.device)
        signs = torch.ones_like(magnitudes)
        signs[1::2] = -1
        rows = [(magnitudes * signs).roll(31 * i) for i in range(output.shape[:-1].numel())]
        replaced.numbers = torch.stack(rows).view(output.shape)
        return replaced.numbers.clone()

    handle = layer.register_forward_hook(replace)
    try:
        yield replaced
    finally:
        handle.remove()


def fitted(numbers: torch.Tensor | None, logits: torch.Tensor, config: Any) -> LogitSettings | None:
    """The settings that turn `numbers` into `logits`, both [rows, positions, columns]; None if there are none.

    Values of the config that fit within rounding are taken instead of the measured ones. None also where the model
    lets less than float32 through, unless the config has the exact values.
    """
    if numbers is None or logits.shape[:-1] != numbers.shape[:-1] or logits.shape[-1] > numbers.shape[-1]:
        return None
    columns = logits.shape[-1]
    tolerance = _TOLERANCE if logits.dtype in (torch.float32, torch.float64) else 0.02
    x, y = numbers[..., :columns].double().flatten(), logits.double().flatten().to(numbers.device)
    if not bool(y.isfinite().all()):
        return None  # Chameleon gives the tokens of pictures a probability of zero
    small, large = x.abs() <= x.abs().min() * 1.5, x.abs() >= x.abs().max() / 1.5
    scale = _median(y[small] / x[small])
    if scale == 0:
        return None
    values = _numbers(config)
    scale = _nearest(scale, [v for value in values for v in (value, 1 / value)] + [1.0], tolerance)
    cap = None
    if abs(_median(y[large] / x[large]) / scale - 1) > tolerance:
        cap = abs(_median(y[large].abs()) / scale)
        cap = _nearest(cap, [v for value in values for v in (value, abs(value / scale))], tolerance)
    expected = scale * x if cap is None else scale * cap * torch.tanh(x / cap)
    if bool(((y - expected).abs() > tolerance * expected.abs()).any()):
        return None
    return LogitSettings(cap, scale, columns)


def ignored(settings: LogitSettings, config: Any) -> dict[str, Any]:
    """Fields of `DECLARED` that a config sets while the model's logits are the plain products of its matrix."""
    text = config.get_text_config()
    if not settings.neutral or getattr(text, "model_type", None) in BEFORE_THE_MATRIX:
        return {}
    values = {name: getattr(text, name, None) for name in DECLARED}
    return {name: value for name, value in values.items() if value not in (None, False, 0, 1, 1.0)}


def _median(values: torch.Tensor) -> float:
    return float(values.median())


def _numbers(config: Any) -> list[float]:
    """Positive numbers in a config, from its text part."""
    text = config.get_text_config()
    values = [*text.to_dict().values(), *(getattr(text, name, None) for name in DECLARED)]
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and 1e-6 < v < 1e6]


def _nearest(value: float, candidates: list[float], tolerance: float) -> float:
    """The candidate within `tolerance` of the value that is nearest to it; the value itself if there is none."""
    near = [c for c in candidates if abs(c / value - 1) <= tolerance]
    return min(near, key=lambda c: abs(c / value - 1), default=value)
