"""The local process pool: at most so many harness processes at a time, each with GPUs of its own."""

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
from compare.run.processes.outcome import Outcome, Reporter, settle
from compare.run.processes.process import HARNESS, Process
from compare.run.processes.queue import Waiting
from compare.run.store import Store

POLL_SECONDS = 0.2


@dataclass
class GpuPool:
    """Names of GPUs (as CUDA_VISIBLE_DEVICES has them) that are handed to processes, round-robin.

    With more processes than GPUs, some share one. Empty: no GPUs here, or one process that may see all.
    """

    names: Sequence[str]
    free: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Sequence[str], jobs: int) -> GpuPool:
        if jobs == 1 or not names:
            return cls(())
        return cls(names, [names[i % len(names)] for i in range(max(jobs, len(names)))])

    def take(self, count: int) -> list[str] | None:
        """`count` different GPUs (all there are, if they are fewer), or None while too few are free."""
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
        self.free.extend(taken)


def visible_gpus() -> list[str]:
    """GPUs that processes started here may use: CUDA_VISIBLE_DEVICES if set, else what nvidia-smi lists."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip() not in ("", "-1")]
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
    task: Task
    process: Process
    work: Path
    gpus: list[str]


def run_local(
    tasks: Sequence[Task],
    store: Store,
    reporter: Reporter,
    jobs: int = 1,
    harness: Sequence[str] = HARNESS,
    gpus: Callable[[], list[str]] = visible_gpus,
) -> list[Outcome]:
    """Run `tasks`, `jobs` at a time; one that fails stops only those that wait for its reference.

    Outcomes come in the order of ending.

    Whatever ends this function, an interrupt included, ends the processes it started.
    """
    waiting = Waiting(tasks)
    running: list[_Running] = []
    outcomes: list[Outcome] = []
    pool = GpuPool.of(gpus() if jobs > 1 else [], jobs)

    def ended(outcome: Outcome) -> None:
        reporter.finished(outcome)
        outcomes.extend([outcome, *waiting.ended(outcome)])

    try:
        while waiting.tasks or running:
            while len(running) < jobs and (task := waiting.next()):
                taken = pool.take(task.job.gpus)
                if taken is None:
                    break
                waiting.take(task)
                reporter.started(task)
                try:
                    running.append(_start(task, store, harness, taken))
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
            reporter.running([(run.task, run.process.state(run.task.job.eval_len)) for run in running], waiting.tasks)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for run in running:
            run.process.terminate()  # all at once, so that they use their time to end side by side
        for run in running:
            run.process.stop()
            store.discard(run.work)
    return outcomes


def _start(task: Task, store: Store, harness: Sequence[str], gpus: Sequence[str]) -> _Running:
    work = store.work(task.key)
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    command = [*harness, *task.job.arguments(work)]
    try:
        return _Running(task, Process(command, store.log(task.label, task.key), environment), work, list(gpus))
    except OSError:
        store.discard(work)
        raise


def _finish(run: _Running, code: int, store: Store) -> Outcome:
    return settle(run.task, run.process.elapsed, run.process.log, code, run.work, store)
