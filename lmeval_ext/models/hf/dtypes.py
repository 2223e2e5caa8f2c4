"""One dtype for all of a model's dense weights: the one that its result names.

Transformers casts weights to `dtype=` while it reads them, but not those that it renames or stacks first (experts), nor
those that a quantizer decodes: they keep the checkpoint's dtype. Tested with transformers 5.19.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def unify_dtype(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Casts dense weights that are narrower than the model's dtype, now and after its first forward has begun.

    dtype: as requested; None: that of most of the model. compressed-tensors decompresses FP4 to bfloat16 at the first
    forward; its own hook on the model was registered first, so it has run when this one runs, once.
    """
    dtype = dtype or main_dtype(model)
    if dtype is None:
        return
    _widen(model, dtype)

    def again(module: torch.nn.Module, _arguments: Any) -> None:
        handle.remove()
        _widen(module, dtype)

    handle = model.register_forward_pre_hook(again)


def main_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype of most elements of the model's dense weights; None if it has none."""
    counts: Counter[torch.dtype] = Counter()
    for _, _, weight in _dense_weights(model):
        counts[weight.dtype] += weight.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def other_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """Names of dense matrices whose dtype is another one, except for those that Transformers keeps in float32."""
    kept = _kept_in_float32(model)
    names = []
    for module_name, name, weight in _dense_weights(model):
        path = f"{module_name}.{name}".lstrip(".")
        if weight.ndim > 1 and weight.dtype != dtype and not any(part in path for part in kept):
            names.append(path)
    return names


def _widen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for _, _, weight in _dense_weights(model):
        if weight.dtype != dtype and weight.dtype.itemsize <= dtype.itemsize:
            weight.data = weight.data.to(dtype)


def _dense_weights(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """Yields (module, name, parameter) of all float parameters but those of layers whose weight is stored packed."""
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        packed = any(p.ndim > 1 and p.dtype not in FLOATS for p in (*own.values(), *module.buffers(recurse=False)))
        if packed and ("weight" not in own or own["weight"].dtype not in FLOATS):
            continue  # its float parameters are scales, in the dtype that its kernel takes
        for name, parameter in own.items():
            if parameter.dtype in FLOATS:
                yield module_name, name, parameter


def _kept_in_float32(model: torch.nn.Module) -> list[str]:
    """Parts of parameter names that a model class keeps in float32 (transformers 5.19: two lists of its own)."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [name for attribute in lists for name in (getattr(model, attribute, None) or ())]
