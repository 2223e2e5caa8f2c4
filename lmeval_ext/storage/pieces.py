"""The record between grouping and roles: a weight in all layers that hold it alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Piece:
    """A logical weight that several layers hold alike, or one outside any stack of layers.

    stack: the name of the numbered list that it is in ("model.layers"), None outside any. module: its name below the
    number, or its full name, without ".weight". numbers: the layers, [""] outside any stack. bits, elements: of one
    layer's; elements None if unknown, then `problem` gives the reason. shape: logical, None if unknown. packing: name
    of the row of `packings.PACKINGS`, or the dtype of a dense tensor. matrix: two or more logical dimensions. copies:
    weights per layer that the piece stands for, experts that are alike.
    """

    stack: str | None
    module: str
    numbers: list[str]
    bits: int
    elements: int | None
    shape: tuple[int, ...] | None
    packing: str
    matrix: bool
    problem: str | None = None
    copies: int = 1

    @property
    def path(self) -> tuple[str, ...]:
        """Return the components of the name, without the layer's number."""
        return tuple((f"{self.stack}." if self.stack else "").split(".")[:-1]) + tuple(self.module.split("."))

    def name(self, number: str) -> str:
        """Return the full name in the layer `number`."""
        return ".".join(filter(None, (self.stack, number, self.module)))
