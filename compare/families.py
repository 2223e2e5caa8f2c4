"""The quantization families as data: names, colours, markers.

EXL2, EXL3, GGUF, VPTQ and QTIP have the colours of ExLlamaV3's plots, which readers may know. FP8, INT, MXFP4 and full
precision are shades of grey distinguished by marker. The colours of the others were chosen far apart (CIE L*a*b*) for
readers with protanopia and deuteranopia too, and every family has its own marker, so nothing depends on distinguishing
red from green.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class Family:
    """How one family is drawn: colours on a light and on a dark background, and a matplotlib marker."""

    name: str
    light: str
    dark: str
    marker: str


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("EXL3", "#5a1fa8", "#a56bff", "o"),
        Family("EXL2", "#3a9d33", "#9be36f", "s"),
        Family("GGUF", "#9e0f26", "#f0465c", "^"),
        Family("VPTQ", "#2f7df0", "#7db9ff", "D"),
        Family("QTIP", "#0d9a9a", "#43d1cb", "P"),
        Family("NVFP4", "#f09a00", "#ffab2e", "*"),
        Family("AWQ", "#703163", "#cd6793", "v"),
        Family("GPTQ", "#be5404", "#ef6c28", "X"),
        Family("bitsandbytes", "#2d3a05", "#faea2b", "<"),
        Family("AQLM", "#0c06f5", "#817bcf", ">"),
        Family("Any-Precision", "#cf8771", "#d1978f", "8"),
        Family("HQQ", "#296a3d", "#bbf6c4", "x"),
        Family("FP8", "#16181c", "#f1f4f8", "h"),
        Family("INT", "#4e555f", "#cdd3dc", "p"),
        Family("MXFP4", "#69717c", "#a8b1bd", "d"),
        Family(FULL_PRECISION, "#1f2328", "#e6eaf0", "H"),
    )
}

# For points of any family that another point beats in both size and metric.
DOMINATED = Family("dominated", "#b4bac3", "#555d69", "o")

_OTHER_MARKERS = (".", "1", "2", "3", "4", "+", "|", "_")
_BY_LOWER_NAME = {name.lower(): family for name, family in FAMILIES.items()}


def family_style(name: str, unknown_index: int = 0) -> Family:
    """The row of `name` (in any case); a family without one gets grey and a marker by its index."""
    known = _BY_LOWER_NAME.get(name.lower())
    marker = _OTHER_MARKERS[unknown_index % len(_OTHER_MARKERS)]
    return known or Family(name, "#33383f", "#d9dee5", marker)


def canonical_family(name: str) -> str:
    """``"EXL3"`` for ``"exl3"``; an unknown name is returned unchanged."""
    known = _BY_LOWER_NAME.get(name.lower())
    return known.name if known else name


def family_order(name: str) -> tuple[int, str]:
    """Sort key: full precision first, then the order of the family table, then unknown families by name."""
    names = list(FAMILIES)
    return (-1 if name == names[-1] else names.index(name) if name in names else len(names), name)
