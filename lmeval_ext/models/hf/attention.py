"""What a model passes to its attention, and what of it the chosen implementation applies.

Models of Transformers call one function for all of attention: their own `eager_attention_forward`, or a registered one
(`sdpa`, `flash_attention_2`, …), which drops arguments that it does not know. Gemma 2's soft-cap is such an argument,
and `sdpa`, the default, drops it. Tested with transformers 5.19.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import AttentionInterface

# Arguments of an attention call that change its result, and that not every implementation takes. Others that
# Transformers' models pass beside these are about masks that they also pass (sliding_window), about positions that
# were applied before (position_ids, position_embeddings), or ask for more output (output_attentions).
ARGUMENTS = {
    "softcap": "the soft-cap of attention scores",  # Gemma 2, VaultGemma, T5Gemma
    "s_aux": "attention sinks",  # gpt-oss, MiMo-V2, Granite SWA
    "position_bias": "the position bias",  # T5, Inkling
    "indices": "the choice of keys",  # DeepSeek-V3.2, GLM with sparse attention
    "block_indices": "the choice of blocks of keys",  # MiniMax-M3
}
# Implementations that compute something else than a model defines. (model type, implementation): the config's field
WRONG = {("falcon", "eager"): "alibi"}  # it adds the position bias twice: once in the mask, once to the scores
# Fields of a config that ask for one of these arguments, whatever the model passes
DECLARED = {"attn_logit_softcapping": "softcap"}


@dataclass
class AttentionCalls:
    """Arguments of `ARGUMENTS` that a model passed to its attention, and those that its implementation dropped."""

    count: int = 0
    passed: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    def wrong(self, config: Any) -> str | None:
        """The field of the config that the model's implementation is known to get wrong, by `WRONG`."""
        text = config.get_text_config()
        # transformers 5.19 gives the implementation in use under this name alone
        name = WRONG.get((text.model_type, str(getattr(text, "_attn_implementation", None))))
        return name if name and getattr(text, name, None) else None

    def never_passed(self, config: Any) -> dict[str, Any]:
        """Fields of `DECLARED` that the config sets and the model does not pass; empty if no call was seen."""
        text = config.get_text_config()
        values = {name: getattr(text, name, None) for name in DECLARED}
        return {n: v for n, v in values.items() if self.count and v and DECLARED[n] not in self.passed}


@contextlib.contextmanager
def recorded_calls(model: torch.nn.Module) -> Iterator[AttentionCalls]:
    """Records the attention calls of the model's forwards: yields an object that they fill."""
    calls = AttentionCalls()
    registered = AttentionInterface()
    before = {name: registered[name] for name in registered}
    places = {sys.modules.get(type(module).__module__) for module in model.modules()}
    eager = "eager_attention_forward"  # a module's own implementation applies all that the module passes
    with contextlib.ExitStack() as stack:
        for place in places:
            if callable(own := getattr(place, eager, None)):
                stack.enter_context(mock.patch.object(place, eager, _recording(own, calls, applies=set(ARGUMENTS))))
        try:
            for name, function in before.items():
                AttentionInterface.register(name, _recording(function, calls, _parameters(function)))
            yield calls
        finally:
            for name, function in before.items():
                AttentionInterface.register(name, function)


def _recording(function: Callable[..., Any], calls: AttentionCalls, applies: set[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recording(*arguments: Any, **keywords: Any) -> Any:
        passed = {name for name in ARGUMENTS if keywords.get(name) is not None}
        calls.count += 1
        calls.passed |= passed
        calls.dropped |= passed - applies
        return function(*arguments, **keywords)

    return recording


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names that a function takes, not counting **keywords."""
    return set(inspect.signature(function).parameters)
