"""`Task`: one computation with all entries that ask for it; jobs to tasks, and which tasks have a result already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compare.console import say
from compare.errors import CompareError, os_reason
from compare.run.plan.job import Job
from compare.run.plan.reference_folder import is_complete, remove_store
from compare.run.store import Store


@dataclass(frozen=True)
class Task:
    """One computation, and the jobs of all entries that ask for it: one model under several labels is run once.

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


def make_tasks(jobs: Sequence[Job]) -> tuple[list[Task], list[tuple[Job, str]]]:
    """Jobs grouped by key; and the jobs that cannot be run, each with the reason."""
    by_key: dict[str, list[Job]] = {}
    unavailable: list[tuple[Job, str]] = []
    for job in jobs:
        if job.unavailable:
            unavailable.append((job, job.unavailable))
            continue
        try:
            by_key.setdefault(job.key(), []).append(job)
        except OSError as error:
            unavailable.append((job, f"{error.filename}: cannot be read ({os_reason(error)})"))
    for same in by_key.values():
        if len(same) > 1:
            say(f"{', '.join(job.label for job in same)}: the same model; run once, shown under each label")
    tasks = [Task(key, tuple(same)) for key, same in by_key.items()]
    writer = next((task.key for task in tasks if task.job.divergence and task.job.divergence.writes), "")
    reads = [task.job.divergence is not None and not task.job.divergence.writes for task in tasks]
    return [replace(t, after=writer) if after else t for t, after in zip(tasks, reads, strict=True)], unavailable


def kept_and_missing(tasks: Sequence[Task], store: Store) -> tuple[dict[str, Path], list[Task]]:
    """Results by key, and the tasks that have to be run.

    A finished reference is run again where its store is gone, if a model has yet to be measured against it or -lf
    asks for it in a folder of its own.
    """
    kept = {task.key: file for task in tasks if (file := store.result(task.key, task.job.log_samples))}
    needed = {task.after for task in tasks if task.key not in kept}
    for task in tasks:
        divergence = task.job.divergence
        if divergence is None or not divergence.writes or is_complete(divergence.folder, task.key):
            continue
        if task.key in needed or divergence.named:
            kept.pop(task.key, None)
    return kept, [task for task in tasks if task.key not in kept]


def forget(tasks: Sequence[Task], store: Store) -> None:
    """Remove the results of `tasks`, and the reference that one of them writes."""
    for task in tasks:
        store.forget(task.key)
        divergence = task.job.divergence
        if divergence is not None and divergence.writes:
            try:
                remove_store(divergence.folder)
            except OSError as error:
                raise CompareError(f"{divergence.folder}: cannot be removed ({os_reason(error)})") from error
