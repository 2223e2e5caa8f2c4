"""LongRoPE: short or long rotary factors, chosen for each scored prompt by its own length.

vLLM takes the long factors for all prompts wherever `max_model_len` exceeds the model's original context
(`phi3_long_rope_scaled_rope.py`, 0.26 to 0.33), so a score would depend on an argument that only sizes memory. Scored
prompts are therefore grouped, and the factors switched between the groups: long ones where more tokens are fed than
the original context has, as in Transformers' `longrope_frequency_update`. (The last token of a prompt is only
predicted, not fed.) Generated text keeps vLLM's choice, since a text may grow past the border.

A compiled model has the factors built in; prompts that need the others are refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lmeval_ext.errors import UserError


class LongRope(NamedTuple):
    """LongRoPE of one engine. context: the original context in tokens. long: whether vLLM itself takes long factors.

    switchable: whether a worker can take the others.
    """

    context: int
    long: bool
    switchable: bool

    def wants_long(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens needs the long factors."""
        return tokens - 1 > self.context

    def check(self, lengths: Sequence[int]) -> None:
        """Raises UserError for a prompt that needs factors that this engine cannot take."""
        wrong = [n for n in lengths if self.wants_long(n) != self.long]
        if self.switchable or not wrong:
            return
        have, need = ("long", "short") if self.long else ("short", "long")
        raise UserError(
            f"a prompt of {wrong[0]} tokens needs the {need} factors of this model's LongRoPE (original context "
            f"{self.context}), but this engine has the {have} ones built in, by max_model_len; leave "
            f"enforce_eager=False and compilation settings out, or set max_model_len "
            f"{'to at most' if self.long else 'above'} {self.context}"
        )


def original_context(config: Any) -> int | None:
    """The original context of a model with LongRoPE, from its (text) configuration; None without LongRoPE."""
    for rope in _rope_parameters(config):
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
            context = rope.get("original_max_position_embeddings")
            context = context or getattr(config, "original_max_position_embeddings", None)
            return int(context or config.max_position_embeddings)
    return None


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Rotary parameters under the names of Transformers 5 and 4, alone or by kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, dict))


# ------------------------------------------------------------------ inside vLLM's workers


def rotary_modules(model: Any) -> list[Any]:
    """Modules with two sets of factors. `use_long_rope` is the attribute of `Phi3LongRoPEScaledRotaryEmbedding`."""
    return [module for module in model.modules() if hasattr(module, "use_long_rope")]


def switch(model: Any, long: bool | None) -> None:
    """Takes the long or the short factors from now on; None: vLLM's own choice."""
    for module in rotary_modules(model):
        if not hasattr(module, "lmeval_ext_own_choice"):
            module.lmeval_ext_own_choice = module.use_long_rope
        module.use_long_rope = module.lmeval_ext_own_choice if long is None else long
