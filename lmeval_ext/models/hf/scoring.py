"""Final hidden states of a Transformers model: the input of its output matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def captured_states(model: torch.nn.Module, enabled: bool = True) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after a forward, the input of the output matrix: [rows, positions, width].

    The list stays empty if not enabled, and for models that do not tell which of their layers is the output matrix.
    """
    states: list[torch.Tensor] = []
    layer = model.get_output_embeddings() if enabled else None
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
