"""The model arguments that every adapter takes for references. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmeval_ext.errors import UserError

MODES = ("hidden", "logits")


@dataclass(frozen=True)
class ReferenceArguments:
    """reference: folder of a store to measure against. save_reference: folder to write one into.

    reference_chunk: tokens whose reference logits stand in memory at once. reference_mode: "hidden" or "logits", what
    save_reference keeps; None: hidden states where the engine shows them.
    """

    reference: str | None = None
    save_reference: str | None = None
    reference_chunk: int | None = None
    reference_mode: str | None = None

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> ReferenceArguments:
        """Takes them out of an adapter's arguments. UserError where they do not fit each other."""
        given = {name: arguments.pop(name, None) for name in cls.__dataclass_fields__}
        for name in ("reference", "save_reference"):
            if given[name] is not None and (not isinstance(given[name], str) or not given[name].strip()):
                raise UserError(f"{name}={given[name]!r}: expected a folder")
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
