"""An emulated NVFP4 kernel for CPUs, where vLLM has none.

vLLM loads this module through its entry-point group `vllm.general_plugins`, in every process. On a platform with
NVFP4 kernels of its own it does nothing. Result files name this kernel `reference`.

The arithmetic is vLLM's own emulation (`nvfp4_emulation_utils`), which follows the format: a value is
e2m1 × e4m3 block scale ÷ float32 global scale, in blocks of 16 along the input. Weights are decoded once, at load,
to the compute dtype. Activations of a W4A4 checkpoint are quantized and decoded at every call, per token and
block, under the checkpoint's input_global_scale, rounding to nearest even.

Tested with vLLM 0.32 (CPU). It replaces `init_nvfp4_linear_kernel` in the modules of `_USERS`: vLLM's official
`register_linear_kernel` is for W4A4 alone, since weight-only schemes are hard-wired to GPU kernels. It also imports the
kernels' base class and the emulation's functions, which are not public; if any of these is gone, vLLM starts without
the emulated kernel and logs a warning.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from lmeval_ext.models.vllm import cpu_experts, cpu_rotary

logger = logging.getLogger(__name__)

_USERS = (
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4",
    "vllm.model_executor.layers.quantization.modelopt",
)
_INIT = "init_nvfp4_linear_kernel"


def register() -> None:
    """Entry point of `vllm.general_plugins`: offers the emulated kernel on a platform that has no other.

    Offers emulated experts (cpu_experts.py) and repairs vLLM's rotary embeddings (cpu_rotary.py) there, too.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    cpu_rotary.register()
    cpu_experts.register()
    for name in _USERS:
        try:
            module = importlib.import_module(name)
            original = getattr(module, _INIT)
        except (ImportError, AttributeError) as error:  # another version of vLLM, which has to start nevertheless
            logger.warning("no emulated NVFP4 kernel in this vLLM (%s): NVFP4 checkpoints will not load here", error)
            continue
        if getattr(original, "_lmeval_ext", False):
            continue
        setattr(module, _INIT, _or_emulated(original))


def _or_emulated(original: Any) -> Any:
    def init(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ValueError as error:  # "Failed to find a kernel…", "Forced NVFP4 kernel … is not supported"
            logger.info("no NVFP4 kernel of vLLM runs here (%s); using the emulated kernel", error)
            return emulated_kernel()

    init._lmeval_ext = True  # type: ignore[attr-defined]
    return init


def emulated_kernel() -> Any:
    """A new instance of the kernel, for the weights of one layer."""
    import torch
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
        ref_nvfp4_quant_dequant,
    )

    class EmulatedNvFp4LinearKernel(NvFp4LinearKernel):
        """Decodes NVFP4 weights at load; quantizes and decodes activations of W4A4 layers at every call."""

        label = "reference"  # in result files, where it stays as it was
        quantizes_activations = True  # where the checkpoint asks for it

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            # The checkpoint stores the reciprocal of `weight_global_scale`; vLLM's loader has inverted it
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

    return EmulatedNvFp4LinearKernel(NvFp4LinearLayerConfig())
