"""The results folder: finished results by key, published in one step; the index of labels; logs; unfinished work.

::

    RESULTS/compare_run.json            labels by key (`compare.results.label_index`)
    RESULTS/KEY/results_2026-….json     one finished computation, as the harness wrote it
    RESULTS/KEY/samples_TASK_….jsonl    its samples, with --log-samples
    RESULTS/logs/LABEL-KEY.log          the output of its process, finished or failed
    RESULTS/reference/MODEL/            a reference store, without -lf or out_logits (`compare.run.plan.reference`)
    RESULTS/.work/KEY-HOST-PID/         where a running harness writes; removed by a later run

A result is never partial: the harness writes into `.work`, the folder is checked, and then renamed. Work folders of
processes that have ended, on this machine, are removed by the next `compare run`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from compare.errors import CompareError, os_reason
from compare.files import write_atomically
from compare.results.label_index import INDEX, Presentation, format_index, parse_index
from compare.results.reading import read_file

_WORK = ".work"
_LOCK = ".lock"


class Store:
    """The results folder at `root`, created if missing. Raises CompareError where it cannot be written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with _user_errors(root):
            (root / "logs").mkdir(parents=True, exist_ok=True)
            (root / _WORK).mkdir(exist_ok=True)
        self._sweep()

    def result(self, key: str, samples: bool = False) -> Path | None:
        """The finished result file of `key`; None where there is none that can be read.

        samples: only a result with its samples beside it counts.
        """
        if samples and not any((self.root / key).glob("samples_*.jsonl")):
            return None
        for file in sorted((self.root / key).glob("results_*.json"), reverse=True):
            if _is_result(file):
                return file
        return None

    def forget(self, key: str) -> None:
        """Remove the result of `key`."""
        with _user_errors(self.root):
            if (self.root / key).exists():
                shutil.rmtree(self.root / key)

    def work(self, key: str) -> Path:
        """An empty folder for the harness to write into."""
        folder = self.root / _WORK / f"{key}-{platform.node()}-{os.getpid()}"
        with _user_errors(self.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def log(self, label: str, key: str) -> Path:
        """The log file of a model's run; its name is safe whatever the label."""
        slug = re.sub(r"[^\w.+-]+", "-", label).strip("-.")[:60] or "model"
        return self.root / "logs" / f"{slug}-{key}.log"

    def publish(self, key: str, work: Path, samples: bool = False) -> Path | None:
        """Make the files in `work` the result of `key`, and return the result file; None where `work` has none.

        samples: replace an earlier result without samples. Raises CompareError where the folder cannot be written to.
        """
        files = [file for file in work.rglob("results_*.json") if _is_result(file)]
        if not files:
            return None
        newest = max(files, key=lambda f: f.stat().st_mtime)
        with _user_errors(self.root), _locked(self.root / _LOCK):
            _to_disk(newest)
            target = self.root / key
            if self.result(key, samples) is None:  # another run of the same command may have published it already
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
        return self.result(key)

    def discard(self, work: Path) -> None:
        """Remove a folder made by `work`."""
        shutil.rmtree(work, ignore_errors=True)

    def show(self, shown: dict[str, list[Presentation]]) -> None:
        """Write `shown`, labels and figures by key, into the index; other keys keep theirs.

        Raises CompareError where the index cannot be written.
        """
        path = self.root / INDEX
        with _user_errors(self.root), _locked(self.root / _LOCK):
            index = parse_index(path.read_bytes(), path) if path.exists() else {}
            changed = format_index(index | shown)
            if path.exists() and path.read_bytes() == changed:
                return  # finished results can be shown even where the disk is full
            write_atomically(path, changed)

    def _sweep(self) -> None:
        """Remove the work folders of processes of this machine that have ended."""
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
    """Wait until the file's content is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _user_errors(root: Path) -> Iterator[None]:
    """Turn an OSError, also one that `write_atomically` reports, into a CompareError about --results."""
    try:
        yield
    except (OSError, CompareError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise CompareError(
            f"--results {root}: cannot be written ({reason.filename or root}: {os_reason(reason)}); free space, or "
            "name another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Allow one writer of the folder at a time; on systems without flock, the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
