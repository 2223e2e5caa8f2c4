"""How results of `compare run` are shown: labels and figures from the spec, kept beside the results, not in them.

`compare run` keys a result by what was computed. Its label stands in ``compare_run.json``, one level above the
result's folder, so that a label can change without a new run::

    results/compare_run.json                 {"version": 1, "results": {KEY: [{"label": …}, …]}}
    results/KEY/results_2026-….json

Several labels for one key are several models in the table: entries of a spec that are the same computation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.families import canonical_family
from compare.results.records import TOLD, Record
from compare.results.values import positive
from compare.text import split_colour_tag

INDEX = "compare_run.json"
VERSION = 1
_FIGURES = ("layer_bpw", "head_bpw", "vram_gb")


@dataclass(frozen=True)
class Presentation:
    """One model of a spec as it is shown. None: as in the result. Bits per weight and GB as in `Quantization`.

    reference: other models are compared with this one, whatever its family.
    """

    label: str
    family: str | None = None
    reference: bool = False
    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = None

    def apply(self, record: Record) -> Record:
        """`record` under this label, with the figures of the spec instead of the measured ones."""
        label, colour = split_colour_tag(self.label)
        changes: dict[str, Any] = {name: value for name in _FIGURES if (value := getattr(self, name)) is not None}
        if self.family:
            changes["family"] = canonical_family(self.family)
        if changes:
            notes = ", ".join(f"{name} {value}" for name, value in changes.items())
            changes["notes"] = (*record.quantization.notes, f"{TOLD}: {notes}")
        return replace(
            record,
            label=label or self.label,
            colour=colour or record.colour,
            baseline_by="the spec" if self.reference else "",
            quantization=replace(record.quantization, **changes),
        )


def parse_index(content: bytes, path: Path) -> dict[str, list[Presentation]]:
    """Presentations by key; unknown fields are ignored. Raises CompareError where the file is not an index."""
    try:
        raw = json.loads(content)
        rows = raw["results"].items()
        names = Presentation.__dataclass_fields__
        return {
            str(key): [_checked(Presentation(**{k: v for k, v in row.items() if k in names})) for row in shown]
            for key, shown in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CompareError(
            f"{path}: is not an index of compare run; remove it and run the same command again (nothing is computed "
            "again)"
        ) from None


def _checked(shown: Presentation) -> Presentation:
    """`shown`. Raises ValueError where a field has the wrong type."""
    figures = [getattr(shown, name) for name in _FIGURES]
    sound = (
        isinstance(shown.label, str)
        and isinstance(shown.family, str | None)
        and isinstance(shown.reference, bool)
        and all(value is None or positive(value) for value in figures)
    )
    if not sound:
        raise ValueError
    return shown


def format_index(index: dict[str, list[Presentation]]) -> bytes:
    """The file's content, without fields at their default."""
    rows = {
        key: [{name: value for name, value in asdict(p).items() if value not in (None, False)} for p in shown]
        for key, shown in sorted(index.items())
    }
    return (json.dumps({"version": VERSION, "results": rows}, indent=1, ensure_ascii=False) + "\n").encode()


class Relabelling:
    """Applies the index of each result's folder, reading each index once."""

    def __init__(self) -> None:
        self._indexes: dict[Path, dict[str, list[Presentation]]] = {}

    def __call__(self, file: Path, records: list[Record]) -> list[Record]:
        """`records` of `file` as its index presents them; unchanged where there is none."""
        folder = file.parent
        shown = self._index(folder.parent).get(folder.name)
        if not shown:
            return records
        return [presentation.apply(record) for presentation in shown for record in records]

    def _index(self, folder: Path) -> dict[str, list[Presentation]]:
        if folder not in self._indexes:
            path = folder / INDEX
            try:
                self._indexes[folder] = parse_index(path.read_bytes(), path)
            except FileNotFoundError:
                self._indexes[folder] = {}
            except OSError as error:
                raise CompareError(f"{path}: cannot be read ({error.strerror or error})") from None
        return self._indexes[folder]
