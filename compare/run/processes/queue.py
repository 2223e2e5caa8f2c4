"""`TaskQueue`: tasks that have not started, some of which wait for the reference they are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from compare.run.plan.task import Task
from compare.run.processes.outcome import Outcome


class TaskQueue:
    """Tasks that have not started, in order; those that read a reference wait until it is written."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self._unfinished = {task.key for task in tasks}  # a key that is not here has a result already

    def next(self) -> Task | None:
        """The first task that may start now, which stays in the queue until `take`; None where all have to wait."""
        return next((task for task in self.tasks if task.after not in self._unfinished), None)

    def take(self, task: Task) -> None:
        """Remove a task that starts."""
        self.tasks.remove(task)

    def ended(self, outcome: Outcome) -> list[Outcome]:
        """Note the end of a task. Returns, after a failure, the outcomes of the tasks that waited for it."""
        key = outcome.task.key
        self._unfinished.discard(key)
        dropped = [] if outcome.result else [task for task in self.tasks if task.after == key]
        self.tasks = [task for task in self.tasks if task not in dropped]
        return [Outcome(task, 0.0, reason=f"{outcome.task.label} failed", dropped=True) for task in dropped]
