"""Whether vLLM's NVFP4 kernels quantize the activations of a W4A4 checkpoint, by vLLM's class names (0.26–0.32).

Native kernels need Blackwell's FP4 units and have not been tested here. A kernel that is not listed is reported by its
name alone.
"""

from __future__ import annotations

WEIGHT_ONLY = (
    "weight-only: this kernel does not quantize activations, as the checkpoint asks for; their error is not in the "
    "figures (emulate it with linear_backend=emulation)"
)
NATIVE = "activations quantized, by native FP4 units"
EMULATED = "activations quantized, emulated"

ACTIVATIONS: dict[str, str] = {
    "MarlinNvFp4LinearKernel": WEIGHT_ONLY,
    "HummingNvFp4LinearKernel": WEIGHT_ONLY,
    "B12xNvFp4W4A16LinearKernel": WEIGHT_ONLY,
    "FlashInferCuteDslNvFp4W4A16LinearKernel": WEIGHT_ONLY,
    "EmulationNvFp4LinearKernel": EMULATED,
    "B12xNvFp4LinearKernel": NATIVE,
    "CutlassNvFp4LinearKernel": NATIVE,
    "FbgemmNvFp4LinearKernel": NATIVE,
    "FlashInferB12xNvFp4LinearKernel": NATIVE,
    "FlashInferCudnnNvFp4LinearKernel": NATIVE,
    "FlashInferCuteDslNvFp4LinearKernel": NATIVE,
    "FlashInferCutlassNvFp4LinearKernel": NATIVE,
    "FlashInferTrtllmNvFp4LinearKernel": NATIVE,
    "TorchNvFp4LinearKernel": NATIVE,
}


def activation_notes(kernels: set[str]) -> list[str]:
    """Notes on the activations, one per kind of kernel that a W4A4 checkpoint runs on."""
    return sorted({ACTIVATIONS[name] for name in kernels if name in ACTIVATIONS})
