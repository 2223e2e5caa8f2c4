"""The results folder: finished results by key, published in one step; the index of labels; logs; work in progress.

::

    RESULTS/compare_run.json            labels by key (`compare.results.label_index`)
    RESULTS/KEY/results_2026-….json     one finished computation, as the harness wrote it
    RESULTS/KEY/samples_TASK_….jsonl    its samples, if they were asked for
    RESULTS/logs/LABEL-KEY.log          what its process said, finished or failed
    RESULTS/reference/MODEL/            a reference store, if no other place is named (`compare.run.plan.reference`)
    RESULTS/.work/KEY-HOST-PID/         where a running harness writes; swept once its `compare run` is gone

A result is there or not: the harness writes into `.work`, the folder is checked, and then renamed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from compare.errors import CompareError
from compare.files import write_atomically
from compare.results.label_index import INDEX, Presentation, format_index, parse_index
from compare.results.reading import read_file

_WORK = ".work"
_LOCK = ".lock"


class Store:
    """The results folder at `root`, made if need be. Raises CompareError where it cannot be written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with _said(root):
            (root / "logs").mkdir(parents=True, exist_ok=True)
            (root / _WORK).mkdir(exist_ok=True)
        self._sweep()

    def result(self, key: str, samples: bool = False) -> Path | None:
        """The finished result file of `key`; None where there is none, or none that can be read.

        samples: only one that has its samples beside it.
        """
        if samples and not any((self.root / key).glob("samples_*.jsonl")):
            return None
        for file in sorted((self.root / key).glob("results_*.json"), reverse=True):
            if _is_result(file):
                return file
        return None

    def forget(self, key: str) -> None:
        """Remove the result of `key`."""
        with _said(self.root):
            if (self.root / key).exists():
                shutil.rmtree(self.root / key)

    def work(self, key: str) -> Path:
        """An empty folder for the harness to write into."""
        folder = self.root / _WORK / f"{key}-{platform.node()}-{os.getpid()}"
        with _said(self.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def log(self, label: str, key: str) -> Path:
        slug = re.sub(r"[^\w.+-]+", "-", label).strip("-.")[:60] or "model"
        return self.root / "logs" / f"{slug}-{key}.log"

    def publish(self, key: str, work: Path, samples: bool = False) -> Path | None:
        """Make what the harness wrote into `work` the result of `key`; None where it wrote no whole result file.

        samples: it takes the place of a result without samples. Raises CompareError where the folder cannot be
        written to.
        """
        files = [file for file in work.rglob("results_*.json") if _is_result(file)]
        if not files:
            return None
        newest = max(files, key=lambda f: f.stat().st_mtime)
        with _said(self.root), _locked(self.root / _LOCK):
            _to_disk(newest)
            target = self.root / key
            if self.result(key, samples) is None:  # another run of the same command may have been faster
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
        return self.result(key)

    def discard(self, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)

    def show(self, shown: dict[str, list[Presentation]]) -> None:
        """Put `shown` into the index, in place of what its keys had. Raises CompareError where it cannot be written."""
        path = self.root / INDEX
        with _said(self.root), _locked(self.root / _LOCK):
            index = parse_index(path.read_bytes(), path) if path.exists() else {}
            changed = format_index(index | shown)
            if path.exists() and path.read_bytes() == changed:
                return  # a full disk must not keep a finished run from being read
            write_atomically(path, changed)

    def _sweep(self) -> None:
        """Remove what killed runs of this machine left behind."""
        for folder in (self.root / _WORK).iterdir():
            owner, _, pid = folder.name.rpartition("-")
            if owner.endswith(f"-{platform.node()}") and pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_result(file: Path) -> bool:
    try:
        return bool(read_file(file))
    except (OSError, ValueError):
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _said(root: Path) -> Iterator[None]:
    """OSError as a message for the user."""
    try:
        yield
    except OSError as error:
        where = error.filename or root
        raise CompareError(
            f"--results {root}: cannot be written ({where}: {error.strerror or error}); free space, or name another "
            "folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer of the folder at a time; on systems without flock the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
