"""Whether a checkpoint asks for quantized activations, which decoded weights run without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# ModelOpt's algorithms that quantize weights alone (modelopt/torch/export/quant_utils.py)
_WEIGHTS_ALONE = frozenset({"FP8_PB_WO", "W4A16_NVFP4", "NVFP4_W4A16", "W4A16_AWQ", "W8A16"})

WEIGHT_ONLY = (
    "weight-only: decoded weights meet unquantized activations, though the checkpoint asks for quantized ones; their "
    "error is not in the figures"
)
UNKNOWN = (
    "weight-only: no quantization config says whether activations are quantized; decoded weights meet unquantized ones"
)
CACHE = "the checkpoint asks for a quantized KV cache; it is not quantized here"


def notes(method: str, quantization: Mapping[str, Any]) -> list[str]:
    """Notes for a result, by the quantization method and config of a checkpoint whose weights are decoded."""
    inner = quantization.get("quantization")
    settings = inner if isinstance(inner, Mapping) else quantization
    said = []
    if method == "none":
        said.append(UNKNOWN)
    elif method == "fp8" or (
        method.startswith("modelopt") and str(settings.get("quant_algo") or "").upper() not in _WEIGHTS_ALONE
    ):
        said.append(WEIGHT_ONLY)
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups")
        parts = groups.values() if isinstance(groups, Mapping) else ()
        if any(isinstance(part, Mapping) and part.get("input_activations") for part in parts):
            said.append(WEIGHT_ONLY)
    if settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme"):
        said.append(CACHE)
    return said
