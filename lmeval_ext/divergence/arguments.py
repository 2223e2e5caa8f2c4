"""The model arguments that every adapter takes for references. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

MODES = ("hidden", "logits")
# Arguments of every adapter that do not change a distribution; engines add their own (`Observed.neutral_arguments`)
NEUTRAL = frozenset({
    "pretrained", "label", "revision", "tokenizer", "trust_remote_code", "device", "batch_size", "max_batch_size",
    "max_length", "max_gen_toks",
})  # fmt: skip


@dataclass(frozen=True)
class ReferenceArguments:
    """reference: folder of a store to measure against. save_reference: folder to write one into.

    reference_chunk: tokens whose reference logits stand in memory at once. reference_mode: "hidden" or "logits", what
    save_reference keeps; None: hidden states where the engine shows them. others: the model's other arguments that may
    change its distributions, as text.
    """

    reference: str | None = None
    save_reference: str | None = None
    reference_chunk: int | None = None
    reference_mode: str | None = None
    others: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def take(cls, arguments: dict[str, Any], neutral: frozenset[str] = frozenset()) -> ReferenceArguments:
        """Removes them from an adapter's arguments. Raises UserError if they contradict each other.

        neutral: the engine's own arguments that do not change its distributions.
        """
        names = ("reference", "save_reference", "reference_chunk", "reference_mode")
        given: dict[str, Any] = {name: arguments.pop(name, None) for name in names}
        given["others"] = {
            name: str(value)
            for name, value in sorted(arguments.items())
            if name not in NEUTRAL | neutral and value is not None
        }
        for name in ("reference", "save_reference"):
            if given[name] is not None and (not isinstance(given[name], str) or not given[name].strip()):
                raise UserError(f"{name}={given[name]!r}: expected a folder")
            if given[name] is not None:
                given[name] = str(Path(given[name]).expanduser())
        if given["reference"] and given["save_reference"]:
            raise UserError(
                "reference= and save_reference= are two runs: one writes what the other is measured against"
            )
        chunk = given["reference_chunk"]
        if chunk is not None:
            try:
                given["reference_chunk"] = int(chunk)
            except (TypeError, ValueError):
                given["reference_chunk"] = 0
            if given["reference_chunk"] < 1 or isinstance(chunk, bool):
                raise UserError(f"reference_chunk={chunk!r}: expected a number of tokens, 1 or more")
        mode = given["reference_mode"]
        if mode is not None and mode not in MODES:
            raise UserError(f"reference_mode={mode!r}: expected one of {', '.join(MODES)}")
        if mode is not None and not given["save_reference"]:
            raise UserError("reference_mode= is for save_reference=; a stored reference knows its own")
        if chunk is not None and not (given["reference"] or given["save_reference"]):
            raise UserError("reference_chunk= is for reference= or save_reference=; add one of them")
        return cls(**given)

    @property
    def active(self) -> bool:
        return bool(self.reference or self.save_reference)
