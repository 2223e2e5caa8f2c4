"""Whether a checkpoint asks for quantized activations, and whether the loaded model quantizes them.

A figure that was computed weight-only is not the format's: `compare` marks points whose notes say so
(compare/results/arithmetic.py). Of weights that we decode ourselves: `lmeval_ext.decoding.activations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lmeval_ext.storage.schemes import method_of

_FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


def asks_for_activations(settings: Mapping[str, Any]) -> bool:
    """Whether the quantization config of a checkpoint that Transformers runs asks for quantized activations."""
    if method_of(dict(settings)) in ("fp8", "mxfp8", "fbgemm_fp8"):
        return True
    groups = settings.get("config_groups")  # compressed-tensors
    return isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("input_activations") for group in groups.values()
    )


def weight_only_note(who: str, matrices: str = "the weights") -> str:
    """The note for the result file. `compare` recognizes its first words. who: what decodes the weights."""
    return (
        f"weight-only: {who} decodes {matrices} at load and does not quantize the activations, as the checkpoint asks "
        "for; their error is not in the figures"
    )


def decoded_by_transformers(model: torch.nn.Module, modules: Iterable[str]) -> list[str]:
    """Those of the modules with stored codes that multiply unquantized activations in the loaded model."""
    known = dict(model.named_modules())
    return [name for name in modules if not _quantizes_inputs(known.get(name))]


def _quantizes_inputs(module: torch.nn.Module | None) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:  # compressed-tensors; a scheme without activations does all that it asks for
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype in _FLOAT8
