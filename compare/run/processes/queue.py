"""Tasks that wait for the reference they are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from compare.run.plan.task import Task
from compare.run.processes.outcome import Outcome


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
