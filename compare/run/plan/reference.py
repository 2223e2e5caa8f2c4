"""Divergence from a reference: which job writes it, where it is stored, and which jobs are measured against it.

As in compare_q, the entry with `out_logits` writes the reference and all others are measured, whatever the flags. All
others are also measured with `-lf FOLDER`, the folder of the reference. In our own form the entry says
`reference: true`, and nothing is measured without `-kld` or `-lf`: by itself, it only draws a reference line in the
plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compare.errors import CompareError, os_reason
from compare.run.plan.fingerprint import fingerprint as content_fingerprint
from compare.run.plan.job import Job, ReferenceRole
from compare.run.plan.reference_folder import is_complete, is_store, writers
from compare.run.request import RunRequest
from compare.run.specs.engine_facts import measured_models, replacement
from compare.text import and_more

_HOW = (
    'add `reference: true` to the entry of the unquantized model (in compare_q\'s form: "out_logits": "FOLDER"), or '
    "name a stored reference with -lf FOLDER"
)


class UnusableReference(CompareError):
    """An entry is the reference, but nothing can be measured against it now."""


@dataclass(frozen=True)
class PlannedReference:
    """The reference that models are measured against.

    fingerprint: of the model that writes it (`Job.fingerprint`). job: the job of its entry, which writes it into
    `folder`; None where -lf names a stored one that no entry of the specs writes. stored: it is not written in this
    run, because -mask leaves `job` out or because there is none.
    """

    label: str
    folder: Path
    fingerprint: str
    job: Job | None = None
    stored: bool = False


def asks_for_divergence(request: RunRequest, jobs: Sequence[Job]) -> bool:
    """Whether a flag or an entry with `out_logits` asks for divergence."""
    return bool(request.divergence_flag) or any(job.out_logits for job in jobs)


def find_reference(jobs: Sequence[Job], selected: Sequence[Job], request: RunRequest) -> PlannedReference:
    """The reference among `jobs`, of which -mask has selected some; or the stored one that -lf names.

    Raises CompareError where specs or flags have to be corrected, UnusableReference where the reference itself has to.
    """
    flag = request.divergence_flag or "out_logits"
    given_folder = request.reference_folder
    if given_folder is not None and given_folder.exists() and not given_folder.is_dir():
        raise CompareError(f"-lf {given_folder}: is a file; a reference is stored in a folder: name a new one")
    candidates = [job for job in selected if job.first] or [job for job in jobs if job.first]
    if not candidates:
        return _stored(request)
    first = candidates[0]
    unfit = _unfit(first)
    if unfit:
        raise UnusableReference(f"{flag}: the reference {first.label!r} cannot be run: {unfit} ({first.source})")
    try:
        fingerprint = first.fingerprint()
        others = [job for job in candidates[1:] if job.unavailable or job.fingerprint() != fingerprint]
    except OSError as error:
        raise UnusableReference(f"{flag}: {error.filename}: cannot be read ({os_reason(error)})") from error
    if others:
        labels = ", ".join(repr(job.label) for job in [first, *others])
        raise CompareError(f"{flag}: several entries are the reference ({labels}); leave one, or choose it with -mask")
    folder = given_folder or (first.out_logits or request.results.absolute() / "reference") / fingerprint
    if writers(folder) - {fingerprint}:
        raise CompareError(
            f"-lf {folder}: holds the reference of another model, or of another version of it or of its engine; name "
            "another folder"
        )
    return _masked(PlannedReference(first.label, folder, fingerprint, first), selected, flag)


def _unfit(job: Job) -> str:
    """Why `job` cannot write a reference; empty where it can."""
    if job.unavailable:
        return job.unavailable
    if job.model not in measured_models():
        use = replacement(job.model) or and_more(list(measured_models()), 9)
        return f"model {job.model} writes no reference; use {use}"
    if not job.windows:
        return (
            f"none of its tasks scores token windows ({', '.join(job.tasks)}); give a data spec, or add one such task"
        )
    return ""


def _masked(reference: PlannedReference, selected: Sequence[Job], flag: str) -> PlannedReference:
    """`reference` as a stored one, if -mask leaves out its job."""
    job = reference.job
    if job is None or job in selected:
        return reference
    if not is_complete(reference.folder, as_writer(job, reference).key()):
        raise UnusableReference(
            f"{flag}: -mask leaves out the reference {job.label!r}, and none is stored in {reference.folder}; let "
            "-mask include it"
        )
    return replace(reference, stored=True)


def _stored(request: RunRequest) -> PlannedReference:
    """The stored reference that -lf names. Raises CompareError where there is none."""
    folder = request.reference_folder
    if folder is None:
        flag = request.divergence_flag
        raise CompareError(f"{flag}: no entry is the reference that the others are measured against; {_HOW}")
    if not is_store(folder):
        raise CompareError(f"-lf {folder}: no reference is stored there, and no entry writes one; {_HOW}")
    try:
        known = writers(folder)
        writer = known.pop() if len(known) == 1 else f"content {content_fingerprint(folder)}"
    except OSError as error:
        raise CompareError(f"-lf {folder}: cannot be read ({os_reason(error)})") from error
    return PlannedReference(str(folder), folder, writer, stored=True)


def as_writer(job: Job, reference: PlannedReference) -> Job:
    """`job` as the one that writes `reference`."""
    return replace(job, divergence=ReferenceRole(reference.folder, reference.fingerprint, writes=True))


def assign_roles(jobs: Sequence[Job], reference: PlannedReference) -> tuple[list[Job], dict[str, list[str]]]:
    """`jobs`, each with its role in measuring against `reference`; and the labels of those without one, by reason."""
    source = reference.job
    writer_key = source.key() if source is not None and not reference.stored else None
    reader = ReferenceRole(reference.folder, reference.fingerprint)
    with_roles: list[Job] = []
    unmeasured: dict[str, list[str]] = {}
    for job in jobs:
        reason = None if job.unavailable else _immeasurable(job, source)
        if job.unavailable or reason:
            with_roles.append(job)
            if reason:
                unmeasured.setdefault(reason, []).append(job.label)
        elif writer_key is not None and _key(job) == writer_key:  # the reference itself, under any label
            with_roles.append(as_writer(job, reference))
        else:
            with_roles.append(replace(job, divergence=reader))
    return with_roles, unmeasured


def _immeasurable(job: Job, source: Job | None) -> str | None:
    """Why `job` cannot be measured against the reference of `source`; None where it can."""
    if {"reference", "save_reference"}.intersection(job.args):
        return "its own arguments name a reference"
    if job.model not in measured_models():
        use = replacement(job.model)
        return f"model {job.model} measures none" + (f"; use {use}" if use else "")
    if not job.windows:
        return f"no task with token windows ({', '.join(job.tasks)})"
    missing = job.windows - source.windows if source is not None else ()
    if source is not None and missing:
        return f"the reference {source.label!r} does not run {', '.join(sorted(missing))}; add it to its tasks"
    return None


def _key(job: Job) -> str | None:
    """The key of `job`; None where a file cannot be read, which `make_tasks` reports."""
    try:
        return job.key()
    except OSError:
        return None
