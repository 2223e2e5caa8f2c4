"""Records which tensors take the places of a model's empty ones while Transformers loads a checkpoint.

Transformers 5 compares shapes only for dense checkpoints (`core_model_loading.set_param_for_module`). PyTorch's public
registration hooks see every assignment.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

Shape = tuple[int, ...]


class Landing:
    """Context: remembers assignments whose shape differs from that of the empty tensor in their place."""

    def __init__(self) -> None:
        self._other_shapes: list[tuple[torch.nn.Module, str, Shape, Shape]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Landing:
        self._handles = [
            register_module_parameter_registration_hook(self._parameter),
            register_module_buffer_registration_hook(self._buffer),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _parameter(self, module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        self._compare(module, name, module._parameters.get(name), tensor)

    def _buffer(self, module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        self._compare(module, name, module._buffers.get(name), tensor)

    def _compare(
        self, module: torch.nn.Module, name: str, place: torch.Tensor | None, tensor: torch.Tensor | None
    ) -> None:
        if place is None or tensor is None or not place.is_meta or tensor.is_meta:
            return
        given, expected = tuple(tensor.shape), tuple(place.shape)
        if [n for n in given if n != 1] != [n for n in expected if n != 1]:
            self._other_shapes.append((module, name, given, expected))

    def other_shapes(self, model: torch.nn.Module) -> dict[str, tuple[Shape, Shape]]:
        """{name in the model: (stored shape, the place's shape)}; dimensions of one element do not count."""
        names = {id(module): name for name, module in model.named_modules()}
        return {
            f"{names[id(module)]}.{name}": (given, expected)
            for module, name, given, expected in self._other_shapes
            if id(module) in names
        }
