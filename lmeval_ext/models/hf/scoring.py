"""Final hidden states of a Transformers model, the input of its output matrix, and logits of long windows in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lmeval_ext.models.hf.logit_settings import LogitSettings

# Scored tokens of a window up to which their logits are computed at once, as a plain forward does
WHOLE_TOKENS = 4096
_PART_BYTES = 256 << 20  # float32 logits of a longer window that are in memory at a time


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


@contextlib.contextmanager
def states_alone(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after a forward, the input of the output matrix `layer`: [rows, positions, width].

    The forward itself computes logits of the last position only.
    """
    states: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(arguments[0])
        return (arguments[0][..., -1:, :], *arguments[1:])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def logits_in_parts(
    layer: torch.nn.Module, settings: LogitSettings, hidden: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields rows of one window with their logits, [rows, settings.columns], computed when they are asked for.

    layer: the output matrix. hidden: its input, [tokens, width].
    """
    step = max(16, _PART_BYTES // (4 * settings.columns))
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        yield rows, settings.applied(layer(hidden[None, rows])[0])
