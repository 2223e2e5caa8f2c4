"""Which files to read: the files given, and every result file of the harness below the folders given.

The harness writes ``results_DATE.json`` into a folder, and beside ``--output_path NAME.json`` a ``NAME_DATE.json``
(lm_eval/loggers/evaluation_tracker.py, 0.4.13). lm-eval 0.4.0 to 0.4.2 write ``results.json`` or ``NAME.json``, 0.3
only the latter. So any ``.json`` file may be one; those without such a name are recognized by their keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# A harness result file has about 10 kB per task; samples are in separate files.
MAX_BYTES = 64 * 1024 * 1024
_NAME = re.compile(r"results(_.*)?\.json|.*_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?\.json")
# Keys at the top of every result file, from 0.3 to 0.4.13.
_KEYS = (b'"results"', b'"versions"')


@dataclass(frozen=True)
class Problem:
    """A path that could not be used, and the reason as shown to the user."""

    path: Path
    reason: str


def find_result_files(paths: Iterable[Path]) -> tuple[list[Path], list[Problem]]:
    """Result files under `paths`, each once, in the order given and by name within a folder.

    A path to a file is taken whatever its name. Links to folders below a path are not followed (they can form
    circles); a path that is itself a link is.
    """
    files: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        candidates = _walk(path, problems) if path.is_dir() else iter((path,))
        for candidate in candidates:
            files.setdefault(os.path.realpath(candidate), candidate)
    return list(files.values()), problems


def _walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename or folder), f"cannot be searched ({error.strerror})"))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        problems.extend(
            Problem(Path(root, name), "is a folder, not a result file") for name in folders if _NAME.fullmatch(name)
        )
        for name in sorted(files):
            if _NAME.fullmatch(name) or (name.lower().endswith(".json") and _has_keys(Path(root, name))):
                yield Path(root, name)


def _has_keys(file: Path) -> bool:
    """Whether a JSON file of another name has the keys of a result file; not those that cannot be read."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return False
        content = file.read_bytes()
    except OSError:
        return False
    return all(key in content for key in _KEYS)
