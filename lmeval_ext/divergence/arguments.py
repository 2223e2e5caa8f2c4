"""Parses the model arguments about references that every adapter takes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

MODES = ("hidden", "logits")
# Arguments of every adapter that do not change its distributions; engines add their own (`Observed.neutral_arguments`)
NEUTRAL = frozenset({
    "pretrained", "label", "revision", "tokenizer", "trust_remote_code", "device", "batch_size", "max_batch_size",
    "max_length", "max_gen_toks",
})  # fmt: skip


@dataclass(frozen=True)
class ReferenceArguments:
    """What a run does with a reference.

    reference: folder of a store to measure against. save_reference: folder to write one into. reference_chunk: number
    of tokens whose reference logits are in memory at once. reference_mode: "hidden" or "logits", what save_reference
    stores; None: hidden states if the engine gives them. others: the model's other arguments that may change its
    distributions, as text.
    """

    reference: str | None = None
    save_reference: str | None = None
    reference_chunk: int | None = None
    reference_mode: str | None = None
    others: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def take(cls, arguments: dict[str, Any], neutral: frozenset[str] = frozenset()) -> ReferenceArguments:
        """Removes these arguments from an adapter's and returns them. Raises UserError for bad or contradictory ones.

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
                "reference= and save_reference= belong to two runs: one writes what the other is measured against; "
                "leave one out"
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
            raise UserError(
                "reference_mode= goes with save_reference= only, since a stored reference has its mode; drop it"
            )
        if chunk is not None and not (given["reference"] or given["save_reference"]):
            raise UserError("reference_chunk= goes with reference= or save_reference=; add one of them")
        return cls(**given)

    @property
    def active(self) -> bool:
        """Whether the run writes a reference or measures against one."""
        return bool(self.reference or self.save_reference)
