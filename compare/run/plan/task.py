"""`Task`: one computation and all entries that ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from compare.run.plan.job import Job


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
