"""Which matrices are exchanged together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<module>.+)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SUFFIX = re.compile(r"\.weight$")


@dataclass(frozen=True)
class Part:
    """Matrices that are quantized together. layer: the one that all of them are in, None if there are several.

    kind: the module's name in its layer, ``self_attn.q_proj``, that all of them have; None if there are several.
    """

    name: str
    matrices: tuple[str, ...]
    layer: int | None
    kind: str | None


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """``(3, "mlp.down_proj")`` of ``model.layers.3.mlp.down_proj.weight``; experts of a layer are of one kind."""
    match = _LAYER.match(_SUFFIX.sub("", name))
    if match is None:
        return None, _SUFFIX.sub("", name)
    return int(match["layer"]), _EXPERT.sub(".experts.", f".{match['module']}")[1:]


# How matrices are put together: from a matrix' layer and kind to the name of its part
GROUPINGS: dict[str, Callable[[int | None, str], str]] = {
    "matrix": lambda layer, kind: kind if layer is None else f"layer {layer} {kind}",
    "layer": lambda layer, kind: kind if layer is None else f"layer {layer}",
    "kind": lambda layer, kind: kind,
}


def parts_of(names: Iterable[str], by: str) -> list[Part]:
    """The parts of the matrices with these names, in the order of their first. by: a key of `GROUPINGS`."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(GROUPINGS[by](*layer_and_kind(name)), []).append(name)
    parts = []
    for name, matrices in members.items():
        layers, kinds = (set(values) for values in zip(*map(layer_and_kind, matrices), strict=True))
        parts.append(
            Part(
                name,
                tuple(matrices),
                layers.pop() if len(layers) == 1 else None,
                kinds.pop() if len(kinds) == 1 else None,
            )
        )
    return parts
