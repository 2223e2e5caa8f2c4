"""Divergence from a reference: who writes it, where it is kept, and who is measured against it.

As in compare_q, the entry with `out_logits` writes the reference and all others are measured, whatever the flags; so
are they with `-lf FOLDER`, which says where the reference lies. In our own form the entry says `reference: true`, and
nothing is measured without `-kld` (or `-lf`): a reference line in the plot is its first meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compare.errors import CompareError
from compare.run.plan.fingerprint import fingerprint
from compare.run.plan.job import Job, ReferenceRole
from compare.run.plan.reference_folder import is_complete, is_store, writers
from compare.run.specs.engine_facts import measured_models, replacement
from compare.text import and_more

_HOW = (
    'add `reference: true` to the entry of the unquantized model (in compare_q\'s form: "out_logits": "FOLDER"), or '
    "name a stored reference with -lf FOLDER"
)


class UnusableReference(CompareError):
    """There is an entry that is the reference, but nothing can be measured against it now."""


@dataclass(frozen=True)
class Asked:
    """What a command asks for. flag: "-kld", "-lf", or "" where neither is given; folder: that of -lf."""

    flag: str
    folder: Path | None
    results: Path


@dataclass(frozen=True)
class PlannedReference:
    """What models are measured against. job: the run that writes it into `folder`, or has written it (`stored`, and
    left out by -mask now); None: a stored one that -lf names, of which no entry tells."""

    label: str
    folder: Path
    fingerprint: str
    job: Job | None = None
    stored: bool = False


def is_asked(asked: Asked, jobs: Sequence[Job]) -> bool:
    return bool(asked.flag) or any(job.out_logits for job in jobs)


def find_reference(jobs: Sequence[Job], chosen: Sequence[Job], asked: Asked) -> PlannedReference:
    """The reference among `jobs`, of which -mask has `chosen` some; or the stored one that -lf names.

    Raises CompareError where the specs or flags have to be mended, UnusableReference where the reference itself has to.
    """
    flag = asked.flag or "out_logits"
    if asked.folder is not None and asked.folder.exists() and not asked.folder.is_dir():
        raise CompareError(f"-lf {asked.folder}: is a file; a reference is kept in a folder: name a new one")
    candidates = [job for job in chosen if job.first] or [job for job in jobs if job.first]
    if not candidates:
        return _stored(asked)
    first = candidates[0]
    unfit = _unfit(first)
    if unfit:
        raise UnusableReference(f"{flag}: the reference {first.label!r} cannot be run: {unfit} ({first.source})")
    try:
        named = first.fingerprint()
        others = [job for job in candidates[1:] if job.unavailable or job.fingerprint() != named]
    except OSError as error:
        raise UnusableReference(f"{flag}: {error.filename}: cannot be read ({error.strerror or error})") from error
    if others:
        labels = ", ".join(repr(job.label) for job in [first, *others])
        raise CompareError(f"{flag}: several entries are the reference ({labels}); leave one, or choose it with -mask")
    folder = asked.folder or (first.out_logits or asked.results.absolute() / "reference") / named
    if writers(folder) - {named}:
        raise CompareError(
            f"-lf {folder}: holds the reference of another model, or of another version of it or of its engine; name "
            "another folder"
        )
    return _masked(PlannedReference(first.label, folder, named, first), chosen, flag)


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


def _masked(reference: PlannedReference, chosen: Sequence[Job], flag: str) -> PlannedReference:
    """`reference` as a stored one, if its run is not among those chosen."""
    job = reference.job
    if job is None or job in chosen:
        return reference
    if not is_complete(reference.folder, written(job, reference).key()):
        raise UnusableReference(
            f"{flag}: -mask leaves out the reference {job.label!r}, and none is stored in {reference.folder}; let "
            "-mask take it in, too"
        )
    return replace(reference, stored=True)


def _stored(asked: Asked) -> PlannedReference:
    if asked.folder is None:
        raise CompareError(f"{asked.flag}: no entry is the reference that the others are measured against; {_HOW}")
    if not is_store(asked.folder):
        raise CompareError(f"-lf {asked.folder}: no reference is stored there, and no entry writes one; {_HOW}")
    try:
        known = writers(asked.folder)
        named = known.pop() if len(known) == 1 else f"content {fingerprint(asked.folder)}"
    except OSError as error:
        raise CompareError(f"-lf {asked.folder}: cannot be read ({error.strerror or error})") from error
    return PlannedReference(str(asked.folder), asked.folder, named, stored=True)


def written(job: Job, reference: PlannedReference) -> Job:
    """`job` as the one that writes `reference`."""
    return replace(job, divergence=ReferenceRole(reference.folder, reference.fingerprint, writes=True))


def measured(jobs: Sequence[Job], reference: PlannedReference) -> tuple[list[Job], dict[str, list[str]]]:
    """`jobs`, each with its part in measuring against `reference`; and the labels of those without, by the reason."""
    source = reference.job
    own = source.key() if source is not None and not reference.stored else None
    divergence = ReferenceRole(reference.folder, reference.fingerprint)
    done: list[Job] = []
    unmeasured: dict[str, list[str]] = {}
    for job in jobs:
        reason = None if job.unavailable else _immeasurable(job, source)
        if job.unavailable or reason:
            done.append(job)
            if reason:
                unmeasured.setdefault(reason, []).append(job.label)
        elif own is not None and _key(job) == own:  # the reference itself, under whatever label
            done.append(written(job, reference))
        else:
            done.append(replace(job, divergence=divergence))
    return done, unmeasured


def _immeasurable(job: Job, source: Job | None) -> str | None:
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
    """None where a file of it cannot be read; that is said when its turn comes."""
    try:
        return job.key()
    except OSError:
        return None
