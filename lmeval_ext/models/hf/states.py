"""What goes into a Transformers model's output matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def captured_states(model: torch.nn.Module, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """A list that holds, after a forward, the input of the output matrix: [rows, positions, width].

    Empty if not wanted, and for models that do not say which of their layers it is.
    """
    states: list[torch.Tensor] = []
    layer = model.get_output_embeddings() if wanted else None
    if layer is None:
        yield states
        return

    def keep(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        states.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
