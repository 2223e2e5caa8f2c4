"""Dense weights of a quantized checkpoint, and whether its matrices can be exchanged one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lmeval_ext.errors import UserError

# Norms, biases and embeddings are stored unquantized: they differ by the rounding of bfloat16 at most (2⁻⁸)
_SAME = 2.0**-7
# Standard deviation of the logarithm of a row's or column's best scale, beyond what rounding errors explain
_MOST_SPREAD = 0.1


def changed_matrices(original: torch.nn.Module, quantized: torch.nn.Module, label: str) -> dict[str, torch.Tensor]:
    """The dense weights of every matrix that differs between both models, by its name in `original`, on the CPU.

    Shapes and dtypes are the original's. Raises UserError for a matrix that is out of reach, and for a checkpoint whose
    weights were scaled or rotated together with their neighbours before rounding (AWQ, SmoothQuant, QuaRot): one of its
    matrices alone does not fit the original's others.
    """
    theirs = dict(quantized.named_parameters(remove_duplicate=False))
    changed, moved = {}, []
    for name, own in original.named_parameters():
        other = _dense(name, own, theirs, quantized, label)
        if own.ndim >= 2 and not torch.equal(own.detach().cpu(), other):
            changed[name] = other
        elif own.ndim < 2 and not _same(own.detach().float().cpu(), other.float()):
            moved.append(name)
    scaled = [name for name, other in changed.items() if _is_rescaled(original.get_parameter(name), other)]
    if moved or scaled:
        named = ", ".join([*moved, *scaled][:3])
        raise UserError(
            f"{label}: its weights were scaled or rotated before they were rounded ({len(moved) + len(scaled)} "
            f"tensors, e.g. {named}), so that one matrix alone does not fit the "
            "original's others; only plainly rounded checkpoints can be attributed"
        )
    if not changed:
        raise UserError(f"{label}: no weight differs from the original's; give a quantized checkpoint")
    return changed


def _dense(
    name: str, own: torch.Tensor, theirs: Mapping[str, torch.Tensor], model: torch.nn.Module, label: str
) -> torch.Tensor:
    """The quantized model's tensor of this name, in the original's dtype; a module that keeps codes is multiplied."""
    found = theirs.get(name)
    if found is not None and found.shape == own.shape and found.is_floating_point():
        return found.detach().to("cpu", own.dtype)
    module_name, _, leaf = name.rpartition(".")
    try:
        module: Any = model.get_submodule(module_name)
    except AttributeError:
        module = None
    if module is not None and leaf == "weight" and own.ndim == 2 and hasattr(module, "in_features"):
        return _by_multiplying(module, own, label, name)
    raise UserError(f"{label}: {name} is not there in the original's shape {tuple(own.shape)}; is it another model?")


@torch.inference_mode()
def _by_multiplying(module: Any, own: torch.Tensor, label: str, name: str) -> torch.Tensor:
    """W of a module that computes x Wᵀ + b: its output for the unit vectors, less that for zero."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    units = torch.eye(own.shape[1], dtype=own.dtype, device=device)
    try:
        weight = (module(units) - module(torch.zeros_like(units[:1]))).t()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{label}: {name} cannot be multiplied ({error}); run it where its kernel runs") from error
    if weight.shape != own.shape:
        raise UserError(f"{label}: {name} has shape {tuple(weight.shape)}, the original {tuple(own.shape)}")
    return weight.to("cpu", own.dtype).contiguous()


def _same(own: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((own - other).abs() <= _SAME * own.abs().clamp_min(1e-3)).all())


def _is_rescaled(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows or columns have other scales, or another direction, than the original's.

    The best scale of a row w is ⟨w, w'⟩ / ⟨w, w⟩. Rounding errors of relative size e move it by e / √n for n elements.
    """
    a, b = own.detach().float().cpu().flatten(0, -2), other.float().flatten(0, -2)
    error = float((b - a).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny))
    for axis in (0, 1):
        norm = (a * a).sum(axis)
        used = norm > 1e-6 * norm.max()
        best = ((a * b).sum(axis)[used] / norm[used]).clamp_min(1e-3)
        most = _MOST_SPREAD + 3 * error / math.sqrt(a.shape[axis])
        if float(best.log().std(correction=0)) > most or not 0.5 < float(best.median()) < 2.0:
            return True
    return False
