"""From the request to jobs: spec files are read, -mask selects models, and divergence is planned."""

from __future__ import annotations

from collections.abc import Sequence

from compare.console import say
from compare.errors import CompareError
from compare.run.plan.job import Job
from compare.run.plan.job_settings import JobSettings
from compare.run.plan.reference import (
    PlannedReference,
    UnusableReference,
    asks_for_divergence,
    assign_roles,
    find_reference,
)
from compare.run.request import RunRequest
from compare.run.specs.loading import load_data, load_models
from compare.run.store import Store


def load_settings(request: RunRequest) -> JobSettings:
    """The settings that all jobs share, the data spec included. Raises CompareError where it has mistakes."""
    data = load_data(request.data) if request.data else None
    return JobSettings(data, request.data, request.tasks, request.limit, request.log_samples)


def load_jobs(request: RunRequest, settings: JobSettings) -> list[Job]:
    """One job per entry of the model specs. Raises CompareError for mistakes; --continue-on-error leaves them out."""
    entries, problems = load_models(request.models)
    if problems and not (request.continue_on_error and entries):
        raise CompareError("; ".join(problems))
    for problem in problems:
        say(f"left out: {problem}")
    return [settings.job(entry) for entry in entries]


def select(jobs: Sequence[Job], mask: str | None) -> list[Job]:
    """Jobs whose label contains a string of `mask`, in any case; references first, as in compare_q."""
    parts = [part.upper() for part in (mask or "").split(";") if part]
    selected = [job for job in jobs if not parts or any(part in job.label.upper() for part in parts)]
    if not selected:
        labels = ", ".join(job.label for job in jobs[:12])
        raise CompareError(f'-mask "{mask}": no label contains any of these strings; labels: {labels}')
    return sorted(selected, key=lambda job: not job.first)


def with_divergence(
    request: RunRequest, all_jobs: Sequence[Job], selected: list[Job]
) -> tuple[list[Job], PlannedReference | None]:
    """`selected`, measured against the reference if that is asked for; prints which jobs cannot be measured.

    Raises CompareError where a flag asks for divergence and nothing can be measured.
    """
    if not asks_for_divergence(request, all_jobs):
        return selected, None
    try:
        reference = find_reference(all_jobs, selected, request)
    except CompareError as error:
        tolerated = request.continue_on_error and isinstance(error, UnusableReference)
        if request.divergence_flag and not tolerated:
            raise
        say(f"{error}; no divergence is measured")
        return selected, None
    jobs, unmeasured = assign_roles(selected, reference)
    for reason, labels in unmeasured.items():
        say(f"no divergence for {', '.join(labels)}: {reason}")
    return jobs, reference


def as_measured_before(request: RunRequest, all_jobs: Sequence[Job], selected: list[Job], store: Store) -> list[Job]:
    """`selected`, with divergence for jobs that have only a result with it, which is used for a run without it, too."""
    try:
        reference = find_reference(all_jobs, selected, request)
        with_roles = assign_roles(selected, reference)[0]
        return [_kept_one(plain, measured, store) for plain, measured in zip(selected, with_roles, strict=True)]
    except (CompareError, OSError):  # no reference; or an unreadable file, which `make_tasks` reports
        return selected


def _kept_one(plain: Job, measured: Job, store: Store) -> Job:
    samples = plain.log_samples
    only_measured = store.result(plain.key(), samples) is None and store.result(measured.key(), samples) is not None
    return measured if only_measured else plain
