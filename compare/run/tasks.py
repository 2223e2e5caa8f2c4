"""Computations that wait, run and end, wherever they run: a `Task` becomes an `Outcome`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compare.errors import CompareError
from compare.run.harness import last_lines
from compare.run.hints import explain, own_error, reason
from compare.run.jobs import Job
from compare.run.references import is_store, mark_complete
from compare.run.store import Store


@dataclass(frozen=True)
class Task:
    """One computation and all entries that ask for it (several labels for one model are one computation).

    after: the key of the task that writes the reference which this one reads; empty where it reads none.
    """

    key: str
    jobs: tuple[Job, ...]
    after: str = ""

    @property
    def job(self) -> Job:
        return self.jobs[0]

    @property
    def label(self) -> str:
        return self.job.label

    @property
    def labels(self) -> str:
        return ", ".join(job.label for job in self.jobs)


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


class Waiting:
    """Tasks that have not started, in their order; those that read a reference wait until it is written."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self._open = {task.key for task in tasks}  # not ended; what is not here was done before

    def next(self) -> Task | None:
        """The first one that may start now. It stays until `take`."""
        return next((task for task in self.tasks if task.after not in self._open), None)

    def take(self, task: Task) -> None:
        self.tasks.remove(task)

    def ended(self, outcome: Outcome) -> list[Outcome]:
        """Note an end. If it was a failure: the outcomes of those that waited for it."""
        key = outcome.task.key
        self._open.discard(key)
        lost = [] if outcome.result else [task for task in self.tasks if task.after == key]
        self.tasks = [task for task in self.tasks if task not in lost]
        return [Outcome(task, 0.0, reason=f"{outcome.task.label} failed", dropped=True) for task in lost]


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
