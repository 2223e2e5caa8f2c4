"""The local process pool: runs up to `jobs` harness processes at a time, each with GPUs of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compare.errors import CompareError
from compare.run.plan.task import Task
from compare.run.processes.failure_hints import explain
from compare.run.processes.fork_servers import ForkServers
from compare.run.processes.harness_process import HARNESS, HarnessProcess, SupervisedCommand
from compare.run.processes.outcome import Outcome, Reporter, settle
from compare.run.processes.queue import TaskQueue
from compare.run.store import Store

POLL_SECONDS = 0.2


@dataclass
class GpuPool:
    """GPUs, named as in CUDA_VISIBLE_DEVICES, that are assigned to processes round-robin.

    With more processes than GPUs, some share one. Empty: there are no GPUs, or the one process may use all.
    """

    names: Sequence[str]
    free: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Sequence[str], jobs: int) -> GpuPool:
        """The pool for up to `jobs` processes at a time on the GPUs `names`."""
        if jobs == 1 or not names:
            return cls(())
        return cls(names, [names[i % len(names)] for i in range(max(jobs, len(names)))])

    def take(self, count: int) -> list[str] | None:
        """`count` different GPUs, or all if there are fewer; None while too few are free."""
        if not self.names:
            return []
        count = min(count, len(set(self.names)))
        taken = list(dict.fromkeys(self.free))[:count]
        if len(taken) < count:
            return None
        for name in taken:
            self.free.remove(name)
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """Return GPUs that `take` gave."""
        self.free.extend(taken)


def visible_gpus() -> list[str]:
    """GPUs that child processes may use: those in CUDA_VISIBLE_DEVICES if it is set, else those of nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


@dataclass
class _Running:
    """A started task. work: the folder that its harness writes into."""

    task: Task
    process: HarnessProcess
    work: Path
    gpus: list[str]


def run_local(
    tasks: Sequence[Task],
    store: Store,
    reporter: Reporter,
    jobs: int = 1,
    harness: Sequence[str] | None = None,
    gpus: Callable[[], list[str]] = visible_gpus,
) -> list[Outcome]:
    """Run `tasks`, up to `jobs` at a time, and return their outcomes in the order in which they ended.

    A failure stops only the tasks that wait for its reference. harness: the command that is the harness' CLI; None:
    `lm_eval` of this Python, forked from a server that has imported it and the engine. gpus: returns the names of the
    GPUs to use. However this function ends, an interrupt included, the processes it started are ended.
    """
    queue = TaskQueue(tasks)
    servers = ForkServers()
    running: list[_Running] = []
    outcomes: list[Outcome] = []
    pool = GpuPool.of(gpus() if jobs > 1 else [], jobs)

    def ended(outcome: Outcome) -> None:
        reporter.finished(outcome)
        outcomes.extend([outcome, *queue.ended(outcome)])

    try:
        while queue.tasks or running:
            while len(running) < jobs and (task := queue.next()):
                taken = pool.take(task.job.gpus)
                if taken is None:
                    break
                queue.take(task)
                reporter.started(task)
                try:
                    running.append(_start(task, store, harness, taken, servers))
                except (CompareError, OSError) as error:
                    pool.give_back(taken)
                    hint = explain(None, [str(error)])
                    ended(Outcome(task, 0.0, reason=str(error), hint=hint))
            for run in list(running):
                code = run.process.poll()
                if code is not None:
                    running.remove(run)
                    pool.give_back(run.gpus)
                    ended(_finish(run, code, store))
            reporter.running([(run.task, run.process.state(run.task.job.eval_len)) for run in running], queue.tasks)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        servers.close(at_once=bool(running))
        for run in running:
            run.process.terminate()  # all first, so that they end in parallel
        for run in running:
            run.process.stop()
            store.discard(run.work)
    return outcomes


def _start(
    task: Task, store: Store, harness: Sequence[str] | None, gpus: Sequence[str], servers: ForkServers
) -> _Running:
    work = store.work(task.key)
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    command = [*(harness or HARNESS), *task.job.arguments(work)]
    start = (None if harness else servers.start(task.job.model)) or SupervisedCommand
    try:
        process = HarnessProcess(command, store.log(task.label, task.key), environment, start)
        return _Running(task, process, work, list(gpus))
    except OSError:
        store.discard(work)
        raise


def _finish(run: _Running, code: int, store: Store) -> Outcome:
    return settle(run.task, run.process.elapsed, run.process.log, code, run.work, store)
