"""Values of a JSON file from strangers, each as the type that is expected or as what stands for "not said"."""

from __future__ import annotations

import math
from typing import Any

from compare.text import clean


def mapping_or_none(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def mapping(parent: dict[str, Any], key: str) -> dict[str, Any]:
    return mapping_or_none(parent.get(key)) or {}


def text(value: object) -> str:
    return clean(value) if isinstance(value, str) else ""


def scalar(value: object) -> str:
    return clean(str(value)) if isinstance(value, (str, int, float)) else ""


def flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def positive(value: object) -> float | None:
    found = number(value)
    return found if found is not None and found > 0 else None


def count(value: object) -> int | None:
    """A whole number above 0 that can count bytes or weights: below 2⁶³."""
    found = positive(value)
    return int(found) if found is not None and found < 2**63 else None


def whole(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None
