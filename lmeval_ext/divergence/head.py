"""The last step of a language model, from final hidden states to logits, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

# A float32 copy of the output matrix up to this size is kept; a larger one is converted in parts each time
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
    _copy: torch.Tensor | None = field(default=None, repr=False, compare=False)
    _memory: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as a store keeps them."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def to(self, device: torch.device | str) -> OutputHead:
        """A copy there, also where it is there already: a stored one is a file's memory."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return OutputHead(self.weight.to(device, copy=True), bias, self.softcap, self.scale)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, reuse: bool = False) -> torch.Tensor:
        """hidden: [tokens, width]. Returns float32 [tokens, vocabulary]; with `reuse`, until the next such call: fresh
        memory is a fifth of a CPU's time.

        Products of 16-bit numbers are exact in float32, so the matrix units of GPUs and CPUs give the same sums as
        float32 arithmetic would, up to the order of the additions.
        """
        hidden = hidden.to(self.weight.device)
        if hidden.is_cuda and hidden.dtype == self.weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16):
            logits = _product_of_16_bits(hidden, self.weight)
        else:
            logits = self._product(hidden, reuse)
        if self.bias is not None:
            logits += self.bias.float()
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def _product(self, hidden: torch.Tensor, reuse: bool) -> torch.Tensor:
        rows, vocabulary = hidden.shape[0], self.weight.shape[0]
        if self._memory is None or self._memory.shape[0] < rows or not reuse:
            memory = hidden.new_empty(rows, vocabulary, dtype=torch.float32)
            self._memory = memory if reuse else self._memory
        else:
            memory = self._memory
        logits = memory[:rows]
        with _precision_for(hidden.dtype, self.weight.dtype):
            hidden = hidden.float()
            for part, weight in self._in_float32():
                torch.mm(hidden, weight.t(), out=logits[:, part])
        return logits

    def _in_float32(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weights, whole or in parts."""
        vocabulary = self.weight.shape[0]
        if self.weight.dtype == torch.float32:
            yield slice(0, vocabulary), self.weight
        elif self.weight.numel() * 4 <= _COPY_BYTES:
            if self._copy is None:
                self._copy = self.weight.float()
            yield slice(0, vocabulary), self._copy
        else:
            for start in range(0, vocabulary, _PART_ROWS):
                part = slice(start, start + _PART_ROWS)
                yield part, self.weight[part].float()


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
def _precision_for(*dtypes: torch.dtype) -> Iterator[None]:
    """Float32 products in float32: programs may have let PyTorch use tf32 or bfloat16 for them. Where all factors were
    bfloat16 to begin with, "medium" rounds none of them, and is three times as fast on a CPU with AMX."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if set(dtypes) == {torch.bfloat16} else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
