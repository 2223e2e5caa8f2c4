"""Rotary embeddings whose frequencies depend on the length of the sequence.

In Transformers, types `dynamic` and `longrope` choose their frequencies by the longest row of a batch, and `dynamic`
keeps those of the longest sequence that it has ever seen. So rows of other lengths, and what ran before, would change
a score. Tested with transformers 5.19 and 5.24 (`modeling_rope_utils.dynamic_rope_update`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LENGTH_DEPENDENT = ("dynamic", "longrope")
_FIRST, _LONGEST = "original_inv_freq", "max_seq_len_cached"  # attributes; with a prefix per kind of layer


def depends_on_length(config: Any) -> bool:
    """Whether the frequencies of a config's text model depend on the length of the sequence."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {str(value) for key, value in _items(rope) if key in ("rope_type", "type")}
    return any(kind in value for value in kinds for kind in LENGTH_DEPENDENT)


def forget_lengths(model: torch.nn.Module) -> None:
    """Makes every new sequence start from the model's first frequencies, whatever ran before."""
    rotaries = [module for module in model.modules() if hasattr(module, "original_max_seq_len")]

    def reset(_: torch.nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return  # the sequence goes on
        for rotary in rotaries:
            names = {*vars(rotary), *(name for name, _ in rotary.named_buffers(recurse=False))}
            for name in [n for n in names if n.endswith(_FIRST)]:
                prefix, first = name.removesuffix(_FIRST), getattr(rotary, name)
                now = getattr(rotary, f"{prefix}inv_freq")
                # A copy: from 5.24 on, the next frequencies are written into this buffer
                rotary.register_buffer(f"{prefix}inv_freq", first.to(now.device, copy=True), persistent=False)
                setattr(rotary, f"{prefix}{_LONGEST}", rotary.original_max_seq_len)

    model.register_forward_pre_hook(reset, with_kwargs=True)


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):  # one set per kind of layer
            yield from _items(value)
        yield key, value
