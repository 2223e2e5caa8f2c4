"""The last step of a language model, from final hidden states to logits, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# A float32 copy of the output matrix up to this size is kept off the GPU; a larger one is converted in parts each time
_COPY_BYTES = 1 << 30
_PART_ROWS = 8192


@dataclass
class OutputHead:
    """logits = scale × cap × tanh((hidden × weightᵀ + bias) / cap), the tanh only where there is a softcap.

    weight: [vocabulary, width], in the dtype that the model has it in. bias: [vocabulary] or None. softcap: as Gemma
    2's final_logit_softcapping. scale: what logits are multiplied with at last (Cohere's logit_scale, 1 / Granite's
    logits_scaling). The order of softcap and scale is that of vLLM's LogitsProcessor.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def to(self, device: torch.device | str) -> OutputHead:
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.softcap, self.scale)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [tokens, width]. Returns float32 [tokens, vocabulary].

        Products of 16-bit numbers are exact in float32, so a GPU's matrix units give the same sums as float32
        arithmetic would, up to the order of the additions.
        """
        hidden = hidden.to(self.weight.device)
        if hidden.is_cuda and hidden.dtype == self.weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16):
            logits = _product_of_16_bits(hidden, self.weight)
        else:
            logits = self._product(hidden.float())
        if self.bias is not None:
            logits += self.bias.float()
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        with _full_precision():
            if self.weight.dtype == torch.float32:
                return hidden @ self.weight.t()
            if self.weight.numel() * 4 <= _COPY_BYTES:
                if getattr(self, "_copy", None) is None:
                    self._copy = self.weight.float()
                return hidden @ self._copy.t()
            logits = hidden.new_empty(hidden.shape[0], self.weight.shape[0])
            for start in range(0, self.weight.shape[0], _PART_ROWS):
                part = slice(start, start + _PART_ROWS)
                torch.mm(hidden, self.weight[part].float().t(), out=logits[:, part])
            return logits


def _product_of_16_bits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    try:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, NotImplementedError, RuntimeError):  # PyTorch before 2.8, or another maker's GPU
        return hidden.float() @ weight.float().t()


# What Transformers' models do to their logits, as their configs name it: key: (softcap, scale) of its value
_LOGIT_SETTINGS: dict[str, Callable[[float], tuple[float | None, float]]] = {
    "final_logit_softcapping": lambda v: (v, 1.0),  # Gemma 2, 3n
    "logit_scale": lambda v: (None, v),  # Cohere
    "logits_scaling": lambda v: (None, 1 / v),  # Granite
    "lm_head_multiplier": lambda v: (None, v),  # Falcon-H1
}


def logit_settings(config: Any) -> tuple[float | None, float]:
    """(softcap, scale) of `OutputHead` by a Transformers config, or one as a dictionary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap, scale = None, 1.0
    for key, meaning in _LOGIT_SETTINGS.items():
        value = text.get(key) if isinstance(text, dict) else getattr(text, key, None)
        if isinstance(value, (int, float)) and value:
            cap, factor = meaning(float(value))
            softcap, scale = cap or softcap, scale * factor
    return softcap, scale


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: programs may have let PyTorch use tf32 or bfloat16 for them."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
