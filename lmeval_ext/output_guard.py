"""Keeps results from being lost to an unwritable --output_path: checks it before the run, writes elsewhere after it.

lm-eval 0.4.13 first writes when everything is computed; if that fails, it logs "Could not save results aggregated" and
exits with success. Two methods of its `EvaluationTracker`, the class behind --output_path, are therefore wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

logger = logging.getLogger(__name__)

_MODULE = "lm_eval.loggers.evaluation_tracker"


def guard() -> None:
    """Wrap the tracker's methods if the harness has loaded it. Idempotent."""
    module = sys.modules.get(_MODULE)
    tracker = getattr(module, "EvaluationTracker", None)
    if tracker is None or hasattr(tracker, "_lmeval_ext"):
        return
    create, save = tracker.__init__, tracker.save_results_aggregated

    @functools.wraps(create)
    def create_checked(self: Any, output_path: str | None = None, *args: Any, **kwargs: Any) -> None:
        if output_path:
            check_writable(Path(output_path))
        create(self, output_path, *args, **kwargs)

    @functools.wraps(save)
    def save_checked(self: Any, results: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        write = functools.partial(save, self, results, *args, **kwargs)
        write()
        if self.output_path and not _is_written(_result_file(self)):
            _write_elsewhere(self, write)

    tracker.__init__, tracker.save_results_aggregated = create_checked, save_checked
    tracker._lmeval_ext = True


def check_writable(output_path: Path) -> None:
    """Raises UserError unless files can be created at --output_path: a folder, or NAME.json in one.

    Creates missing folders, as the harness would after the run.
    """
    folder = output_path.parent if output_path.suffix == ".json" else output_path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lmeval-ext-") as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise UserError(
            f"--output_path {output_path}: cannot be written to ({error.strerror or error}); name another folder. "
            "Nothing was run."
        ) from error


def _result_file(tracker: Any) -> Path | None:
    """The file that the tracker writes (`save_results_aggregated`); None if it failed before it had a date."""
    date = getattr(tracker, "date_id", None)
    if date is None:
        return None
    path = Path(tracker.output_path)
    if path.suffix == ".json":
        return path.with_name(f"{path.stem}_{date}.json")
    return path / str(tracker.general_config_tracker.model_name_sanitized) / f"results_{date}.json"


def _is_written(file: Path | None) -> bool:
    """Whether the file is complete: a full disk leaves half of it."""
    try:
        return file is not None and isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _write_elsewhere(tracker: Any, save: Callable[[], None]) -> None:
    """Write into the first folder that accepts it; samples, which the tracker writes later, go there too."""
    output_path, partial = tracker.output_path, _result_file(tracker)
    if partial is not None:
        with contextlib.suppress(OSError):
            partial.unlink()
    for folder in _fallback_folders():
        tracker.output_path = str(folder)
        save()
        if _is_written(_result_file(tracker)):
            logger.error(
                "--output_path %s could not be written to; results are in %s", output_path, _result_file(tracker)
            )
            return
    tracker.output_path = output_path
    logger.error(
        "--output_path %s could not be written to, nor could any other folder; the results are in the table below only",
        output_path,
    )


def _fallback_folders() -> Iterator[Path]:
    """Folders in the working folder, in the user's home and among the temporary files."""
    for parent in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):  # a deleted working folder, a user without a home
            yield parent() / "lm_eval_results"
