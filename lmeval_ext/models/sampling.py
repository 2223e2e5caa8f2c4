"""The harness' generation arguments, for engines that sample by themselves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lmeval_ext.errors import UserError

# Arguments of the harness and of Transformers without an effect in these engines, and the values that are accepted
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False, None),
    "use_cache": (True, False, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "length_penalty": (1, 1.0, None),
    "early_stopping": (True, False, None),
    "skip_special_tokens": (True, None),
    "spaces_between_special_tokens": (True, False, None),
}


def known_arguments(
    kwargs: dict[str, Any], known: Collection[str], engine: str, shown: Collection[str]
) -> dict[str, Any]:
    """Returns the arguments of `kwargs` that affect sampling; the neutral ones are checked and left out.

    known: names that the engine takes. shown: names that the message lists. Raises UserError for all others.
    """
    given = dict(kwargs)
    for name, allowed in _NEUTRAL.items():
        if name in given and given.pop(name) not in allowed:
            raise UserError(f"generation argument {name}={kwargs[name]!r}: {engine} cannot do that")
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"generation argument {name}={value!r} is not known to {engine}; it takes {', '.join(shown)}, "
                "until and max_gen_toks"
            )
    return given


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; top_k 0, min_p 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def of(cls, kwargs: dict[str, Any], engine: str) -> Sampling:
        """From the harness' normalized generation arguments. Raises UserError for one that `engine` does not take."""
        names = cls.__dataclass_fields__
        given = known_arguments(kwargs, names, engine, names)
        if kwargs.get("do_sample") and given.get("temperature") is None:
            given["temperature"] = 1.0  # as in `hf`
        return cls(**{name: type(getattr(cls, name))(value) for name, value in given.items() if value is not None})
