"""Reads the output matrix from an unquantized checkpoint's files, for engines that keep it in their own layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from lmeval_ext.divergence.head import OutputHead, logit_settings
from lmeval_ext.errors import UserError
from lmeval_ext.storage.checkpoint import read_checkpoint
from lmeval_ext.storage.grouping import group_tensors

_DENSE = (torch.bfloat16, torch.float16, torch.float32)


def dense_head(folder: str | Path) -> OutputHead:
    """The output matrix and what follows it. Raises UserError if it is quantized."""
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    names: dict[str, str] = {}
    for part in group_tensors(checkpoint.tensors, checkpoint.facts):
        name = next((name for name in (f"{part.name}.weight", part.name) if name in checkpoint.tensors), None)
        if name is not None:
            names.setdefault(part.role, name)
    # A separate head has priority over the token embeddings, which replace it in a model with tied embeddings
    role = "head" if "head" in names or checkpoint.tied is False else "token_embedding"
    name = names.get(role)
    weight = None if name is None else _read(folder, name)
    if name is None or weight is None or weight.dtype not in _DENSE:
        raise UserError(f"{folder}: its output matrix is quantized; use reference_mode=logits, or an unquantized model")
    bias = name.removesuffix("weight") + "bias"
    return OutputHead(
        weight,
        _read(folder, bias) if role == "head" and bias in checkpoint.tensors else None,
        *logit_settings(checkpoint.text_config),
    )


def _read(folder: Path, name: str) -> torch.Tensor | None:
    """The tensor of this name; None if no file of the checkpoint has it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    return None
