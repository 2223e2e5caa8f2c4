"""`Outcome`: how a task ended, from the exit code, files and log of its process; and who receives the progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compare.errors import CompareError
from compare.run.plan.reference_folder import is_store, mark_complete
from compare.run.plan.task import Task
from compare.run.processes.failure_hints import explain, own_error, reason
from compare.run.processes.harness_process import last_lines
from compare.run.store import Store


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    seconds: how long it ran. result: the published file; None for a failure, which `reason`, `lines` (the end of the
    log) and `hint` explain. dropped: it was not started, because the task that it waits for failed.
    """

    task: Task
    seconds: float
    log: Path | None = None
    result: Path | None = None
    reason: str = ""
    lines: tuple[str, ...] = ()
    hint: str | None = None
    dropped: bool = False


class Reporter(Protocol):
    """Receives progress events."""

    def started(self, task: Task) -> None: ...

    def running(self, states: Sequence[tuple[Task, str]], waiting: Sequence[Task]) -> None:
        """states: each running task with its state in words."""

    def finished(self, outcome: Outcome) -> None: ...


def settle(task: Task, seconds: float, log: Path, code: int, work: Path, store: Store) -> Outcome:
    """Publish the result in `work` of a harness that ended with exit code `code`, and return the outcome."""
    try:
        result = store.publish(task.key, work, task.job.log_samples) if code == 0 else None
        if result is not None:
            _mark(task)
    except CompareError as error:
        return failure(task, seconds, log, code, known_reason=str(error))
    finally:
        store.discard(work)
    return Outcome(task, seconds, log, result) if result else failure(task, seconds, log, code)


def _mark(task: Task) -> None:
    """Mark a reference as complete, if `task` writes one. Raises CompareError where it wrote none."""
    divergence = task.job.divergence
    if divergence is None or not divergence.writes:
        return
    if not is_store(divergence.folder):
        raise CompareError(f"no reference was written to {divergence.folder} (on a cluster: all nodes must share it)")
    mark_complete(divergence.folder, task.key, divergence.reference)


def failure(task: Task, seconds: float, log: Path, code: int | None, known_reason: str = "") -> Outcome:
    """The outcome of a failure, from exit code and log. known_reason: takes the place of what the log shows."""
    lines = last_lines(log)
    message = own_error(lines)
    return Outcome(
        task=task,
        seconds=seconds,
        log=log,
        reason=known_reason or message or reason(code, lines),
        lines=() if message else tuple(lines),
        hint=None if message else explain(code, lines),
    )
