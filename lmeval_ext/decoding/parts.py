"""What a decoder is given: the tensors of one matrix, and what its checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Parts = dict[str, torch.Tensor]  # the tensors of one matrix, by suffix


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix.

    name: its name in the checkpoint, without ".weight". quantization: the checkpoint's quantization config. precision:
    bits per weight to decode at, for formats that hold several; None: the highest.
    """

    name: str = ""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    precision: int | None = None


def expect(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def expect_shape(parts: Parts, suffix: str, *shape: int) -> None:
    """Raise ValueError unless the part has this shape."""
    stored = list(parts[suffix].shape)
    expect(stored == list(shape), f"{suffix[1:]} has the shape {stored}, expected {list(shape)}")
