"""Which files to read: the files given, and every ``results_*.json`` below the folders given."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PATTERN = "results_*.json"


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
            Problem(Path(root, name), "is a folder, not a result file")
            for name in folders
            if fnmatch.fnmatchcase(name, PATTERN)
        )
        yield from (Path(root, name) for name in sorted(files) if fnmatch.fnmatchcase(name, PATTERN))
