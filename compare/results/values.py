"""Values of an untrusted JSON file: each as the expected type, or empty or None where it has another type."""

from __future__ import annotations

import math
from typing import Any

from compare.text import clean


def mapping_or_none(value: object) -> dict[str, Any] | None:
    """A JSON object; None for any other type."""
    return value if isinstance(value, dict) else None


def mapping(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under `key`; empty where there is none."""
    return mapping_or_none(parent.get(key)) or {}


def text(value: object) -> str:
    """A string, cleaned; empty for any other type."""
    return clean(value) if isinstance(value, str) else ""


def scalar(value: object) -> str:
    """A string or number as text; empty otherwise."""
    return clean(str(value)) if isinstance(value, (str, int, float)) else ""


def flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def number(value: object) -> float | None:
    """A finite number; None for any other value, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        figure = float(value)
    except OverflowError:
        return None
    return figure if math.isfinite(figure) else None


def not_a_number(value: object) -> bool:
    """Whether a value is NaN or infinite: as a number, or as the text that JSON writers make of one."""
    if isinstance(value, str):
        return value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity")
    return isinstance(value, float) and not math.isfinite(value)


def positive(value: object) -> float | None:
    figure = number(value)
    return figure if figure is not None and figure > 0 else None


def count(value: object) -> int | None:
    """A positive number below 2⁶³, rounded down: bytes, weights."""
    figure = positive(value)
    return int(figure) if figure is not None and figure < 2**63 else None


def integer(value: object) -> int | None:
    """A whole number from 0 on; None for any other value."""
    figure = number(value)
    return int(figure) if figure is not None and figure >= 0 and figure == int(figure) else None
