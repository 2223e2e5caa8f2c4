"""Reads the file of ``compare attribute``: what each part of a quantized model costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import NOTHING_USABLE, CompareError
from compare.results.values import count, integer, mapping, mapping_or_none, number, text

FORMAT, VERSION = "lmeval-ext attribution", 1
_MOST_PARTS = 1_000_000


@dataclass(frozen=True, slots=True)
class PartCost:
    """One part. kld: mean divergence in nats with this part alone quantized; None where it is not finite."""

    name: str
    layer: int | None
    kind: str
    weights: int | None
    kld: float | None
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Attribution:
    """The file. base: the original's own divergence from the reference; whole: with all parts quantized."""

    file: Path
    original: str
    quantized: str
    scheme: str
    reference: str
    task: str
    windows: int | None
    scored_tokens: int | None
    by: str
    base: float | None
    whole: float | None
    whole_stderr: float | None
    additivity: float | None
    parts: tuple[PartCost, ...]

    def alone(self, part: PartCost) -> float | None:
        """What the part adds to the original's own divergence, in nats."""
        return None if part.kld is None or self.base is None else part.kld - self.base


def read_attribution(path: Path) -> Attribution:
    """Raises CompareError for a file that is not one."""
    try:
        content = mapping_or_none(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CompareError(f"{path}: cannot be read as JSON ({reason})", NOTHING_USABLE) from None
    rows = content.get("parts") if content is not None else None
    if content is None or content.get("format") != FORMAT or not isinstance(rows, list):
        raise CompareError(f"{path}: not a file of compare attribute; it writes one with --original and --quantized",
                           NOTHING_USABLE)  # fmt: skip
    if content.get("version") != VERSION:
        raise CompareError(f"{path}: version {content.get('version')!r}; this release reads version {VERSION}",
                           NOTHING_USABLE)  # fmt: skip
    quantized, base, whole = (mapping(content, key) for key in ("quantized", "base", "whole"))
    parts = [_part(row) for row in rows[:_MOST_PARTS] if isinstance(row, dict)]
    return Attribution(
        file=path,
        original=text(content.get("original")),
        quantized=text(quantized.get("label")),
        scheme=text(quantized.get("scheme")),
        reference=text(mapping(content, "reference").get("label")),
        task=text(content.get("task")),
        windows=integer(content.get("windows")),
        scored_tokens=integer(content.get("scored_tokens")),
        by=text(content.get("by")),
        base=number(base.get("kld")),
        whole=number(whole.get("kld")),
        whole_stderr=number(whole.get("stderr")),
        additivity=number(content.get("additivity")),
        parts=tuple(parts),
    )


def _part(row: dict[str, Any]) -> PartCost:
    return PartCost(text(row.get("name")), integer(row.get("layer")), text(row.get("kind")), count(row.get("weights")),
                    number(row.get("kld")), number(row.get("stderr")))  # fmt: skip
