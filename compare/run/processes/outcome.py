"""Computations that wait, run and end, wherever they run: a `Task` becomes an `Outcome`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compare.errors import CompareError
from compare.run.plan.reference_folder import is_store, mark_complete
from compare.run.plan.task import Task
from compare.run.processes.failure_hints import explain, own_error, reason
from compare.run.processes.process import last_lines
from compare.run.store import Store


@dataclass(frozen=True)
class Outcome:
    """How a task ended. result: the published file; else reason, the log's last lines and a hint say why not.

    dropped: it was not started, since the task that it waits for failed.
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
    """Who is told how it goes."""

    def started(self, task: Task) -> None: ...

    def running(self, states: Sequence[tuple[Task, str]], waiting: Sequence[Task]) -> None:
        """What each running task is at, in words."""

    def finished(self, outcome: Outcome) -> None: ...


def settle(task: Task, seconds: float, log: Path, code: int, work: Path, store: Store) -> Outcome:
    """The outcome of a harness that has ended with `code`; what it left in `work` is published."""
    try:
        result = store.publish(task.key, work, task.job.log_samples) if code == 0 else None
        if result is not None:
            _mark(task)
    except CompareError as error:
        return failure(task, seconds, log, code, why=str(error))
    finally:
        store.discard(work)
    return Outcome(task, seconds, log, result) if result else failure(task, seconds, log, code)


def _mark(task: Task) -> None:
    """Note that a reference is complete. Raises CompareError where none was written."""
    divergence = task.job.divergence
    if divergence is None or not divergence.writes:
        return
    if not is_store(divergence.folder):
        raise CompareError(f"no reference was written to {divergence.folder} (on a cluster: all nodes must share it)")
    try:
        mark_complete(divergence.folder, task.key, divergence.reference)
    except OSError as error:
        raise CompareError(f"{divergence.folder}: cannot be written ({error.strerror or error})") from error


def failure(task: Task, seconds: float, log: Path, code: int | None, why: str = "") -> Outcome:
    """An outcome from an exit code and a log. why: what is known already."""
    lines = last_lines(log)
    said = own_error(lines)
    return Outcome(
        task=task,
        seconds=seconds,
        log=log,
        reason=why or said or reason(code, lines),
        lines=() if said else tuple(lines),
        hint=None if said else explain(code, lines),
    )
