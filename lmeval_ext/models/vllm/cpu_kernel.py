"""A reference NVFP4 kernel for machines whose vLLM has none: the CPU.

vLLM loads this through its entry-point group `vllm.general_plugins`, in every process. On a platform with
NVFP4 kernels of its own it does nothing. Results made with it say `kernel: reference`.

The arithmetic is vLLM's own emulation (`nvfp4_emulation_utils`), which follows the format: a value is
e2m1 × e4m3 block scale ÷ float32 global scale, blocks of 16 along the input. Weights are decoded once, at load,
to the compute dtype. Activations of a W4A4 checkpoint are quantized and decoded at every call, per token and
block, under the checkpoint's input_global_scale, rounding to nearest even.

Tried with vLLM 0.32 (CPU). What it replaces is `init_nvfp4_linear_kernel` in the modules of `_USERS`: vLLM's official
`register_linear_kernel` serves W4A4 alone, since weight-only schemes are hard-wired to GPU kernels. It also imports the
kernels' base class and the emulation's functions from vLLM's insides; where any of these is gone, vLLM starts
without the reference kernel and says so.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)

_USERS = (
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4",
    "vllm.model_executor.layers.quantization.modelopt",
)
_INIT = "init_nvfp4_linear_kernel"


def register() -> None:
    """Entry point of `vllm.general_plugins`: offer the reference kernel where there is no other."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for name in _USERS:
        try:
            module = importlib.import_module(name)
            original = getattr(module, _INIT)
        except (ImportError, AttributeError) as error:  # another vLLM: it must start all the same
            logger.warning("no reference NVFP4 kernel in this vLLM (%s): such checkpoints will not load here", error)
            continue
        if getattr(original, "_lmeval_ext", False):
            continue
        setattr(module, _INIT, _or_reference(original))


def _or_reference(original: Any) -> Any:
    def init(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ValueError as error:  # "Failed to find a kernel…", "Forced NVFP4 kernel … is not supported"
            logger.info("no NVFP4 kernel of vLLM's own runs here (%s); using the reference kernel", error)
            return reference_kernel()

    init._lmeval_ext = True  # type: ignore[attr-defined]
    return init


def reference_kernel() -> Any:
    """An instance of the kernel, for one layer's weights."""
    import torch
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
        ref_nvfp4_quant_dequant,
    )

    class ReferenceNvFp4LinearKernel(NvFp4LinearKernel):
        """Decodes NVFP4 weights at load; quantizes and decodes activations of W4A4 layers at every call."""

        label = "reference"

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            # `weight_global_scale` is a factor by now; the checkpoint stores its reciprocal
            weight = dequantize_to_dtype(
                layer.weight.data,
                layer.weight_scale.data,
                layer.weight_global_scale.data,
                torch.get_default_dtype(),
                block_size=16,
                swizzle=False,
            )
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            del layer.weight_scale

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            scale = getattr(layer, "input_global_scale_inv", None)
            if scale is not None:
                flat = x.reshape(-1, x.shape[-1])
                x = ref_nvfp4_quant_dequant(flat, scale, block_size=16).reshape(x.shape)
            return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)

    return ReferenceNvFp4LinearKernel(NvFp4LinearLayerConfig())
