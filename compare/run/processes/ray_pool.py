"""Runs tasks on a Ray cluster: Ray schedules them by GPUs and memory, and repeats those of a lost worker.

Ray (extra `ray`) is imported only here. Every node needs this package, the engines, and the checkpoints under the
same paths (a shared file system, or hub ids); result files and logs come back through Ray.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.errors import CompareError, first_line
from compare.run.plan.job import Job
from compare.run.plan.job_settings import GIB
from compare.run.plan.task import Task
from compare.run.processes.harness_process import HARNESS, HarnessProcess
from compare.run.processes.outcome import Outcome, Reporter, failure, settle
from compare.run.processes.queue import TaskQueue
from compare.run.store import Store

# How often the task of a lost worker or node is run again elsewhere; a model that fails is not run again.
RETRIES = 3
_MEMORY_FACTOR, _MEMORY_BASE = 1.25, 2 * GIB  # loading holds all weights once, and some of them twice
_GPU_FACTOR = 1.2  # weights, activations and the KV cache of one window
_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Needs:
    """What a task requires of a node: GPUs, and bytes of main memory (0: unknown)."""

    gpus: int
    memory: int


@dataclass(frozen=True)
class Returned:
    """What a worker returns: exit code, the files that the harness wrote, its log, and the seconds it took."""

    code: int
    files: dict[str, bytes]
    log: bytes
    seconds: float
    node: str


def evaluate(job: Job, harness: Sequence[str] | None) -> Returned:
    """Run `job` in a child process of this worker, and return its files. harness: None: this Python's `lm_eval`."""
    import platform

    with tempfile.TemporaryDirectory(prefix="compare-run-") as folder:
        output, log = Path(folder) / "output", Path(folder) / "log"
        output.mkdir()
        process = HarnessProcess([*(harness or HARNESS), *job.arguments(output)], log, {})
        while (code := process.poll()) is None:
            time.sleep(_WAIT_SECONDS)
        written = [*output.rglob("results_*.json"), *output.rglob("samples_*.jsonl")]
        files = {file.name: file.read_bytes() for file in written}
        return Returned(code, files, log.read_bytes(), process.elapsed, platform.node())


def run_on_ray(
    tasks: Sequence[Task],
    store: Store,
    reporter: Reporter,
    address: str | None = None,
    harness: Sequence[str] | None = None,
    gpu_gb: float | None = None,
) -> list[Outcome]:
    """Run `tasks` on the cluster at `address` (None: RAY_ADDRESS, or a cluster of this machine alone).

    harness: as in `run_local`; None: `lm_eval` of each worker's Python. gpu_gb: memory of one GPU, in GiB. Raises
    CompareError where Ray is missing or the cluster cannot be reached.
    """
    ray = _connect(address)
    pending: dict[Any, tuple[Task, float]] = {}
    queue = TaskQueue(tasks)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        work = ray.remote(evaluate)

        def submit() -> None:
            while task := queue.next():
                queue.take(task)
                needs = fitting(needs_of(task.job, gpu_gb), nodes)
                options = {"num_gpus": needs.gpus, "memory": needs.memory or None, "max_retries": RETRIES}
                handle = work.options(name=f"compare {task.label}", **options).remote(task.job, harness)
                pending[handle] = (task, time.monotonic())
                reporter.started(task)

        submit()
        outcomes: list[Outcome] = []
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_WAIT_SECONDS)
            for handle in done:
                task, began = pending.pop(handle)
                outcome = _collect(ray, handle, task, began, store)
                reporter.finished(outcome)
                outcomes.extend([outcome, *queue.ended(outcome)])
            submit()  # tasks whose reference is written now
            reporter.running([(task, "on the cluster") for task, _ in pending.values()], queue.tasks)
        return outcomes
    except KeyboardInterrupt:
        for handle in pending:
            ray.cancel(handle, force=True)
        raise
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise CompareError(
            f"--launcher ray needs Ray ({error}); install it with pip install 'lmeval-ext[ray]'"
        ) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CompareError(f"--ray-address {address}: no Ray cluster there ({first_line(error)})") from error
    return ray


def _collect(ray: Any, handle: Any, task: Task, began: float, store: Store) -> Outcome:
    """Bring the files of a finished task into `store`, and return the outcome. began: by `time.monotonic`."""
    log = store.log(task.label, task.key)
    try:
        returned: Returned = ray.get(handle)
    except ray.exceptions.RayError as error:
        lines = tuple(str(error).strip().splitlines()[-3:])
        return Outcome(
            task, time.monotonic() - began, reason=f"lost on the cluster ({type(error).__name__})", lines=lines
        )
    work: Path | None = None
    try:
        log.write_bytes(returned.log)
        work = store.work(task.key)
        for name, content in returned.files.items():
            (work / name).write_bytes(content)
    except (OSError, CompareError) as error:
        if work is not None:
            store.discard(work)
        return failure(task, returned.seconds, log, returned.code, known_reason=str(error))
    return settle(task, returned.seconds, log, returned.code, work, store)


def needs_of(job: Job, gpu_gb: float | None) -> Needs:
    """The needs of `job` from its checkpoint's headers: GPUs by `vram_gb`, main memory by the size of all weights."""
    weights, vram = _storage(job.checkpoint)
    gpus = job.gpus
    if gpu_gb and vram:
        gpus = max(gpus, math.ceil(vram * _GPU_FACTOR / gpu_gb))
    return Needs(gpus, int(weights * _MEMORY_FACTOR + _MEMORY_BASE) if weights else 0)


def fitting(needs: Needs, nodes: Sequence[dict[str, float]]) -> Needs:
    """`needs`, limited to what the largest node has: a task that fits nowhere would wait forever."""
    gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    memory = max((int(node.get("memory", 0)) for node in nodes), default=0)
    return Needs(min(needs.gpus, gpus), min(needs.memory, memory))


def _storage(checkpoint: str) -> tuple[int | None, float | None]:
    """(bytes of all weights, vram_gb) of a local checkpoint; (None, None) where they are unknown."""
    if not Path(checkpoint).exists():
        return None, None
    command = [sys.executable, "-m", "lmeval_ext.storage", "--json", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        figures = json.loads(done.stdout)
        return figures.get("weight_bytes"), figures.get("vram_gb")
    except ValueError:
        return None, None
