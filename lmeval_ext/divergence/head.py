"""Computes logits from final hidden states, the last step of a language model, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

# A float32 copy of the output matrix is kept up to this size; a larger matrix is converted in parts at every use
_COPY_BYTES = 1 << 30
_PART_ROWS = 8192


@dataclass
class OutputHead:
    """logits = scale × cap × tanh((hidden × weightᵀ + bias) / cap), the tanh only with a softcap.

    weight: [vocabulary, width], in the model's dtype. bias: [vocabulary] or None. softcap: as Gemma 2's
    final_logit_softcapping. scale: the last factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
    The order of softcap and scale is that of vLLM's LogitsProcessor.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    _copy: torch.Tensor | None = field(default=None, repr=False, compare=False)
    _memory: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weight and bias by the names that they have in a store."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def to(self, device: torch.device | str) -> OutputHead:
        """A copy on `device`, even if the head is there already: a head from a store is the memory of a mapped file."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return OutputHead(self.weight.to(device, copy=True), bias, self.softcap, self.scale)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, reuse: bool = False) -> torch.Tensor:
        """Compute logits, float32 [tokens, vocabulary], from hidden [tokens, width].

        reuse: the result is valid until the next such call only, which writes into the same memory; allocating fresh
        memory takes a fifth of the time on a CPU. Products of 16-bit numbers are exact in float32, so the matrix units
        of GPUs and CPUs give the same sums as float32 arithmetic, up to the order of the additions.
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
        with _exact_products(hidden.dtype, self.weight.dtype):
            hidden = hidden.float()
            for part, weight in self._in_float32():
                torch.mm(hidden, weight.t(), out=logits[:, part])
        return logits

    def _in_float32(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns of the logits and their weights in float32, at once or in parts."""
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


# What models apply to their logits, by the config's field, for engines that do not show it: (softcap, scale)
_LOGIT_SETTINGS: dict[str, Callable[[float], tuple[float | None, float]]] = {
    "final_logit_softcapping": lambda v: (v, 1.0),  # Gemma 2, 3n, 4, NanoChat
    "logits_soft_cap": lambda v: (v, 1.0),  # RecurrentGemma
    "output_logit_soft_cap": lambda v: (v, 1.0),  # xLSTM
    "logit_scale": lambda v: (None, v),  # Cohere
    "logits_scaling": lambda v: (None, 1 / v),  # Granite
    "lm_head_multiplier": lambda v: (None, v),  # Falcon-H1
}
# The same fields with another meaning. model_type: {field: its meaning}
_BY_MODEL: dict[str, dict[str, Callable[[float], tuple[float | None, float]]]] = {
    "hyperclovax": {"logits_scaling": lambda v: (None, v)},
    "minicpm3": {"logits_scaling": lambda v: (None, 1.0)},  # divides the hidden states
}


def logit_settings(config: Any) -> tuple[float | None, float]:
    """(softcap, scale) of `OutputHead` by the fields of a Transformers config, which may also be a dictionary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    get = text.get if isinstance(text, dict) else lambda key: getattr(text, key, None)
    softcap, scale = None, 1.0
    for key, meaning in (_LOGIT_SETTINGS | _BY_MODEL.get(str(get("model_type")), {})).items():
        value = get(key)
        if isinstance(value, (int, float)) and value:
            cap, factor = meaning(float(value))
            softcap, scale = cap or softcap, scale * factor
    return softcap, scale


def _product_of_16_bits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden × weightᵀ in float32 on a GPU, for factors of the same 16-bit dtype."""
    try:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, NotImplementedError, RuntimeError):  # PyTorch before 2.8, or another maker's GPU
        return hidden.float() @ weight.float().t()


@contextlib.contextmanager
def _exact_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Compute float32 products in float32, even if the program lets PyTorch use tf32 or bfloat16 for them.

    If all factors are bfloat16 numbers, "medium" rounds none of them, and is three times as fast on a CPU with AMX.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if set(dtypes) == {torch.bfloat16} else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
