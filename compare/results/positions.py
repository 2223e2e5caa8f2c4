"""Reads ``configs.TASK.metadata.by_position``: figures by the position in the window, and their slope over it.

Unsound values are left out. Older files have no such block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from compare.results.values import integer, mapping, mapping_or_none, number
from compare.text import clean

_MOST_BINS, _MOST_CURVES, _MOST_BLOCKS = 64, 64, 1024  # an untrusted file may have millions

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric by position: value and standard error of each bin, and the slope per doubling of the position.

    The slope is in the unit of the metric's mean: nats for a perplexity and its ratio. totals, products: Σ value of
    each block and bin, and Σ log2(position) · value of each block; empty where the file has none.
    """

    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    slope: float | None = None
    slope_error: float | None = None
    totals: Rows = ()
    products: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Positions:
    """Figures by position. Bin i holds the positions from edges[i] to edges[i + 1] − 1, and tokens[i] tokens.

    blocks: of the bootstrap behind the errors. curves: by the metric's name, without a filter. block_tokens, block_x:
    tokens of each block and bin, and Σ x and Σ x² of x = log2(position) of each block; empty where the file has none.
    """

    edges: tuple[int, ...]
    tokens: tuple[int, ...]
    blocks: int
    curves: dict[str, Curve] = field(hash=False)
    block_tokens: Rows = ()
    block_x: Rows = ()

    def bin_names(self) -> list[str]:
        """``1–15``, ``16–31``, …"""
        return [f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(self.edges)]


def read_positions(metadata: dict[str, Any]) -> Positions | None:
    """The figures by position in a task's metadata; None where there are none, or their bins are unsound."""
    block = mapping_or_none(metadata.get("by_position"))
    if block is None:
        return None
    edges, tokens, blocks = _integers(block.get("edges")), _integers(block.get("tokens")), integer(block.get("blocks"))
    if not 2 <= len(edges) <= _MOST_BINS + 1 or len(tokens) != len(edges) - 1 or blocks is None or edges[0] < 1:
        return None
    if any(b <= a for a, b in pairwise(edges)):
        return None
    rows = max(blocks, 1)
    curves = {
        clean(name): curve
        for name, value in list(mapping(block, "metrics").items())[:_MOST_CURVES]
        if isinstance(value, dict) and (curve := _curve(value, len(tokens), rows)) is not None
    }
    if not curves:
        return None
    block_tokens, block_x = _rows(block.get("block_tokens"), rows, len(tokens)), _rows(block.get("block_x"), rows, 2)
    return Positions(tuple(edges), tuple(tokens), blocks, curves, block_tokens, block_x)


def _integers(values: object) -> list[int]:
    """The whole numbers of a list; empty where one of them is none."""
    numbers = [integer(value) for value in values] if isinstance(values, list) and len(values) <= 2 * _MOST_BINS else []
    sound = [value for value in numbers if value is not None and value < 2**63]
    return sound if len(sound) == len(numbers) else []


def _rows(values: object, rows: int, columns: int) -> Rows:
    """A list of lists of finite numbers; empty where it has another shape or another content."""
    if not isinstance(values, list) or len(values) != rows or rows > _MOST_BLOCKS:
        return ()
    result = []
    for value in values:
        numbers = [number(n) for n in value] if isinstance(value, list) and len(value) == columns else []
        sound = tuple(n for n in numbers if n is not None)
        if len(sound) != columns:
            return ()
        result.append(sound)
    return tuple(result)


def _curve(block: dict[str, Any], bins: int, rows: int) -> Curve | None:
    values, errors = block.get("values"), block.get("stderr")
    if not isinstance(values, list) or not isinstance(errors, list) or not len(values) == len(errors) == bins:
        return None
    return Curve(
        tuple(number(value) for value in values),
        tuple(_error(value) for value in errors),
        number(block.get("slope")),
        _error(block.get("slope_stderr")),
        _rows(block.get("block_totals"), rows, bins),
        tuple(p for (p,) in _rows(_in_rows(block.get("block_products")), rows, 1)),
    )


def _in_rows(values: object) -> object:
    return [[value] for value in values] if isinstance(values, list) and len(values) <= _MOST_BLOCKS else None


def _error(value: object) -> float | None:
    figure = number(value)
    return figure if figure is not None and figure >= 0 else None
