"""Multiple choice on a Transformers model: each context is computed once, its choices from its keys and values.

The harness' `hf` runs a context again for every choice of more than one token. Tested with transformers 5.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from lmeval_ext.models.hf.rotary import depends_on_length
from lmeval_ext.models.shared_contexts import Group, common_prefix
from lmeval_ext.models.target_logprobs import logprobs_of_targets

Result = tuple[float, bool]  # sum of log-probabilities, all targets greedy


def can_share(config: Any) -> bool:
    """Whether a causal model of this config gives the same result in parts; its cache is checked during scoring.

    Models that also see pictures do not: they count positions in their own ways.
    """
    return config.get_text_config() is config and not depends_on_length(config)


class NotShared(Exception):
    """The model's cache is not plain keys and values of every position: sliding windows, recurrent layers, …"""


class SharedContexts:
    """Scores groups of requests; tokens that neighbouring contexts share (few-shot examples) are computed once, too.

    model: a causal language model. keeps: whether its forward takes `logits_to_keep`. vocabulary: number of logits in
    the softmax.
    """

    def __init__(self, model: Any, vocabulary: int, keeps: bool, device: torch.device) -> None:
        self._model, self._vocabulary, self._keeps, self._device = model, vocabulary, keeps, device
        self._ids: tuple[int, ...] = ()
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of _ids, one pair per layer

    @torch.inference_mode()
    def score(self, group: Group, rows: int) -> Iterator[tuple[int, Result]]:
        """Yields (request, result) for each request of a group, `rows` of its tails at a time."""
        self._advance(group.context)
        order = sorted(range(len(group.tails)), key=lambda i: -len(group.tails[i]))
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            tails = [group.tails[i] for i in part]
            length = len(tails[0])
            ids = torch.zeros((len(tails), length), dtype=torch.int64)
            for row, tail in enumerate(tails):
                ids[row, : len(tail)] = torch.tensor(tail)
            logits = self._forward(ids, self._cache(len(tails), len(self._ids)), length).logits
            for row, i in enumerate(part):
                for request, targets in group.wanted[i]:
                    end = len(group.tails[i])
                    picked = logits[row, end - len(targets) : end]
                    logprobs, greedy = logprobs_of_targets(picked, torch.tensor(targets), self._vocabulary)
                    yield request, (float(logprobs.sum(dtype=np.float64)), bool(greedy.all()))

    def _advance(self, context: Sequence[int]) -> None:
        """Holds keys and values of `context`; those of its common beginning with the previous one are kept."""
        kept = common_prefix(self._ids, context)
        self._held = [(k[:, :, :kept], v[:, :, :kept]) for k, v in self._held] if kept else []
        self._ids = tuple(context[:kept])
        if len(context) > kept:
            cache = self._cache(1, kept)
            filled = self._forward(torch.tensor([list(context[kept:])]), cache, 1)
            self._held = _keys_and_values(getattr(filled, "past_key_values", None), len(context))
            self._ids = tuple(context)

    def _cache(self, rows: int, length: int) -> Any:
        if not length:
            return None  # the model creates the kind that it needs
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._held):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def _forward(self, ids: torch.Tensor, cache: Any, keep: int) -> Any:
        more = {"logits_to_keep": keep} if self._keeps else {}
        return self._model(input_ids=ids.to(self._device), past_key_values=cache, use_cache=True, **more)


def _keys_and_values(cache: Any, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, heads, length, dim] of each layer. Raises NotShared for a layer with any other cache."""
    layers = getattr(cache, "layers", None) or []
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    if not pairs or not plain or any(k is None or v is None or k.shape[-2] != length for k, v in pairs):
        raise NotShared
    return pairs
