"""The command itself: a request to tasks, tasks to results, results to the plot."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.run.display import Display
from compare.run.plan.fingerprint import fingerprint
from compare.run.plan.job import Job
from compare.run.plan.job_settings import JobSettings
from compare.run.plan.selection import as_measured_before, load_jobs, load_settings, select, with_divergence
from compare.run.plan.task import Task, forget, kept_and_missing, make_tasks
from compare.run.processes.harness_process import HARNESS
from compare.run.processes.local_pool import run_local
from compare.run.processes.outcome import Outcome
from compare.run.request import RunRequest
from compare.run.store import Store
from compare.write import write_plot

SOME_FAILED = 3
INTERRUPTED = 130


def run_command(request: RunRequest) -> int:
    """Run ``compare run`` and return its exit code. Raises CompareError for mistakes that the user can correct."""
    fingerprint.cache_clear()  # files may have changed since an earlier command in this process
    settings = load_settings(request)
    all_jobs = load_jobs(request, settings)
    jobs, reference = with_divergence(request, all_jobs, select(all_jobs, request.mask))
    store = None if request.dry_run and not request.results.is_dir() else Store(request.results)
    if reference is None and store is not None and not request.clear_cache:
        jobs = as_measured_before(request, all_jobs, jobs, store)
    tasks, unavailable = make_tasks(jobs)
    if store is None or request.dry_run:
        _print_dry_run(request, tasks, unavailable, store)
        return 0
    if request.clear_cache:
        forget(tasks, store)
    _print_data(settings)
    if reference is not None:
        print(f"Reference: {reference.label}, kept in {reference.folder}", flush=True)
    try:
        with _interruptible(), Display(len(tasks) + len(unavailable)) as display:
            for job, reason in unavailable:
                display.unavailable(job.label, reason, job.source)
            evaluation = _Evaluation(request, store, display)
            results, dropped = evaluation.run(tasks)
            if dropped:
                tasks = evaluation.run_without_reference(tasks, dropped, results)
    except KeyboardInterrupt:
        done = sum(store.result(task.key) is not None for task in tasks)
        say(f"stopped: {done} of {len(tasks)} done and kept; the same command goes on from here")
        return INTERRUPTED
    files = [results[task.key] for task in tasks if task.key in results]
    failed = len(unavailable) + len(tasks) - len(files)
    say(f"{len(files)} of {len(tasks) + len(unavailable)} models have a result; see: compare table {request.results}")
    if not files:
        return NOTHING_USABLE
    return _plot(request, files) or (SOME_FAILED if failed and not request.continue_on_error else 0)


@dataclass(frozen=True)
class _Evaluation:
    """Runs the tasks that have no result yet."""

    request: RunRequest
    store: Store
    display: Display

    def run(self, tasks: Sequence[Task]) -> tuple[dict[str, Path], list[Task]]:
        """Results by key, kept ones and new ones; and the tasks that were dropped because their reference failed."""
        self.store.show({task.key: [job.shown for job in task.jobs] for task in tasks})
        results, missing = kept_and_missing(tasks, self.store)
        for task in tasks:
            if task.key in results:
                self.display.kept(task, results[task.key])
        outcomes = _launch(self.request, missing, self.store, self.display)
        results |= {outcome.task.key: outcome.result for outcome in outcomes if outcome.result}
        return results, [outcome.task for outcome in outcomes if outcome.dropped]

    def run_without_reference(self, tasks: list[Task], dropped: list[Task], results: dict[str, Path]) -> list[Task]:
        """Run `dropped` without divergence, if that is still useful; add to `results`; return the changed `tasks`.

        Where a flag asked for divergence, perplexities alone do not justify hours of evaluation.
        """
        if self.request.divergence_flag and not self.request.continue_on_error:
            reason = (
                "not run: the reference failed; correct it, or run the others without divergence: --continue-on-error"
            )
            self.display.dropped(dropped, reason, failed=True)
            return tasks
        self.display.dropped(dropped, "run without divergence: the reference failed", failed=False)
        unmeasured, _ = make_tasks([replace(job, divergence=None) for task in dropped for job in task.jobs])
        new_results, _ = self.run(unmeasured)
        results |= new_results
        return [task for task in tasks if task not in dropped] + unmeasured


def _launch(request: RunRequest, tasks: Sequence[Task], store: Store, display: Display) -> list[Outcome]:
    if not tasks:
        return []
    if request.launcher == "ray":
        from compare.run.processes.ray_pool import run_on_ray

        return run_on_ray(tasks, store, display, request.ray_address, request.harness, request.gpu_gb)
    return run_local(tasks, store, display, request.jobs, request.harness)


def _print_dry_run(
    request: RunRequest, tasks: Sequence[Task], unavailable: Sequence[tuple[Job, str]], store: Store | None
) -> None:
    """Print each model's state and, per task, the command that would run it. store: None where there is no folder."""
    missing = list(tasks) if store is None else kept_and_missing(tasks, store)[1]
    to_run = {task.key: task for task in missing}
    for task in tasks:
        state = "to run" if task.key in to_run else "kept"
        if task.key in to_run and task.after in to_run:
            state += f" after {to_run[task.after].label}"
        for job in task.jobs:
            print(f"{job.label}: {state} ({job.source}, key {task.key})")
        print(f"    {shlex.join([*(request.harness or HARNESS), *task.job.arguments(request.results / task.key)])}")
    for job, reason in unavailable:
        print(f"{job.label}: not run: {reason} ({job.source})")


def _print_data(settings: JobSettings) -> None:
    """Print which text is used, in which windows, and whether its blank rows count."""
    data = settings.data
    if data is None or not (data.dataset or data.text_path):
        return
    parts = (
        (f"windows of {data.eval_len} tokens", data.eval_len),
        (f"one every {data.eval_stride}", data.eval_stride),
        (f"the first {data.max_rows}" if data.max_rows else "all of them", True),
        (f"{data.warmup_tokens} tokens of warm-up", data.warmup_tokens),
        ("chat template", data.chat_template),
    )
    windows = ", ".join(text for text, is_set in parts if is_set)
    rows = {"keep": "kept", "drop": "dropped"}[settings.blank_rows()]
    print(f"Loading dataset: {data.text_path or data.dataset} ({windows}; blank rows {rows})", flush=True)


def _plot(request: RunRequest, files: Sequence[Path]) -> int:
    """Draw the plot if one was asked for; print why it failed, if so. Returns the exit code."""
    if request.plot is None:
        return 0
    try:
        write_plot(files, request.plot_options, request.plot)
    except CompareError as error:
        say(str(error))
        return error.exit_code
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does: processes stopped, finished models kept.

    A signal that is ignored when the run starts stays ignored: `nohup compare run` outlives its terminal.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    not_ignored = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in not_ignored}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
