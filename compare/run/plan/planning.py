"""From the command's arguments to tasks: which models, with which part in measuring divergence, and what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compare.console import say
from compare.errors import CompareError
from compare.run.plan.job import Job
from compare.run.plan.jobs import RunSettings
from compare.run.plan.reference import Asked, PlannedReference, UnusableReference, find_reference, is_asked, measured
from compare.run.plan.reference_folder import is_complete, remove_store
from compare.run.plan.task import Task
from compare.run.specs.loading import load_data, load_models
from compare.run.store import Store


def make_plan(arguments: argparse.Namespace) -> RunSettings:
    data = load_data(arguments.data) if arguments.data else None
    return RunSettings(data, arguments.data, tuple(arguments.tasks or ()), arguments.limit, arguments.log_samples)


def load_jobs(arguments: argparse.Namespace, plan: RunSettings) -> list[Job]:
    entries, problems = load_models(arguments.models)
    if problems and not (arguments.continue_on_error and entries):
        raise CompareError("; ".join(problems))
    for problem in problems:
        say(f"left out: {problem}")
    return [plan.job(entry) for entry in entries]


def select(jobs: Sequence[Job], mask: str | None) -> list[Job]:
    """Jobs whose label contains a string of `mask`, any case; references first, as in compare_q."""
    wanted = [part.upper() for part in (mask or "").split(";") if part]
    chosen = [job for job in jobs if not wanted or any(part in job.label.upper() for part in wanted)]
    if not chosen:
        labels = ", ".join(job.label for job in jobs[:12])
        raise CompareError(f'-mask "{mask}": no label contains any of these strings; labels: {labels}')
    return sorted(chosen, key=lambda job: not job.first)


def with_divergence(
    arguments: argparse.Namespace, every: Sequence[Job], chosen: list[Job]
) -> tuple[list[Job], PlannedReference | None]:
    """`chosen`, measured against the reference if the command asks for that; who is not is said."""
    asked = _asked(arguments)
    if not is_asked(asked, every):
        return chosen, None
    try:
        reference = find_reference(every, chosen, asked)
    except CompareError as error:
        if asked.flag and not (arguments.continue_on_error and isinstance(error, UnusableReference)):
            raise
        say(f"{error}; no divergence is measured")
        return chosen, None
    jobs, unmeasured = measured(chosen, reference)
    for reason, labels in unmeasured.items():
        say(f"no divergence for {', '.join(labels)}: {reason}")
    return jobs, reference


def as_measured_before(arguments: argparse.Namespace, every: Sequence[Job], jobs: list[Job], store: Store) -> list[Job]:
    """`jobs`, those measured where only such a result is kept: it has all that one without divergence has."""
    try:
        reference = find_reference(every, jobs, _asked(arguments))
        before = measured(jobs, reference)[0]
        return [_kept_one(job, other, store) for job, other in zip(jobs, before, strict=True)]
    except (CompareError, OSError):  # no reference, or a file that cannot be read: its turn comes
        return jobs


def _kept_one(job: Job, other: Job, store: Store) -> Job:
    samples = job.log_samples
    only_other = store.result(job.key(), samples) is None and store.result(other.key(), samples) is not None
    return other if only_other else job


def _asked(arguments: argparse.Namespace) -> Asked:
    folder: Path | None = arguments.logits_file
    flag = "-kld" if arguments.kld else "-lf" if folder else ""
    return Asked(flag, folder.expanduser().absolute() if folder else None, arguments.results)


def make_tasks(jobs: Sequence[Job]) -> tuple[list[Task], list[tuple[Job, str]]]:
    """Jobs by key, and those that cannot be run, each with the reason."""
    by_key: dict[str, list[Job]] = {}
    unavailable: list[tuple[Job, str]] = []
    for job in jobs:
        if job.unavailable:
            unavailable.append((job, job.unavailable))
            continue
        try:
            by_key.setdefault(job.key(), []).append(job)
        except OSError as error:
            unavailable.append((job, f"{error.filename}: cannot be read ({error.strerror or error})"))
    for same in by_key.values():
        if len(same) > 1:
            say(f"{', '.join(job.label for job in same)}: the same model; run once, shown under each label")
    tasks = [Task(key, tuple(same)) for key, same in by_key.items()]
    writer = next((task.key for task in tasks if task.job.divergence and task.job.divergence.writes), "")
    reads = [task.job.divergence is not None and not task.job.divergence.writes for task in tasks]
    return [replace(t, after=writer) if after else t for t, after in zip(tasks, reads, strict=True)], unavailable


def kept_and_missing(tasks: Sequence[Task], store: Store) -> tuple[dict[str, Path], list[Task]]:
    """Results by key, and what has to be run.

    A finished reference is run again where its store is gone, and a model that has yet to be measured needs it, or -lf
    says that it shall be there.
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
                raise CompareError(f"{divergence.folder}: cannot be removed ({error.strerror or error})") from error
