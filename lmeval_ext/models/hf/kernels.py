"""The kernels that run quantized weights in Transformers: which one is asked for, and which one ran."""

from __future__ import annotations

from typing import Any

import torch

# GPTQModel's kernels that multiply in the dtype of the model, by method. Its default on a CPU (TorchAten, 7.5) rounds
# activations and scales to 16 bits whatever dtype= says, which moved perplexities by 2e-4.
EXACT_ON_CPU = {"gptq": "torch", "awq": "torch_awq"}


def prefer_exact(method: str | None, config: Any) -> None:
    """Asks for the exact kernel on a CPU, in Transformers' quantization config, unless it names a kernel itself."""
    if method in EXACT_ON_CPU and str(getattr(config, "backend", None) or "auto") in ("auto", "AwqBackend.AUTO"):
        config.backend = EXACT_ON_CPU[method]


def kernel_name(model: torch.nn.Module, method: str | None) -> str | None:
    """The method, and the classes of the layers with packed codes where they tell which kernel ran."""
    layers = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    return f"{method} ({', '.join(sorted(layers))})" if method and layers else method
