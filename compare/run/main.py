"""The command itself: specs to tasks, tasks to results, results to the plot."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from compare.comparison.comparison import Options
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.run.display import Display
from compare.run.plan.fingerprint import fingerprint
from compare.run.plan.job import Job
from compare.run.plan.jobs import RunSettings
from compare.run.plan.planning import (
    as_measured_before,
    forget,
    kept_and_missing,
    load_jobs,
    make_plan,
    make_tasks,
    select,
    with_divergence,
)
from compare.run.plan.task import Task
from compare.run.processes.local_pool import run_local
from compare.run.processes.outcome import Outcome
from compare.run.processes.process import HARNESS
from compare.run.store import Store
from compare.write import PICTURE_SUFFIXES, PlotRequest, has_display, write_plot

SOME_FAILED = 3
INTERRUPTED = 130


def run_command(arguments: argparse.Namespace) -> int:
    """Run ``compare run`` and return its exit code. Raises CompareError for what the user can mend."""
    plot_file = _plot_file(arguments)
    fingerprint.cache_clear()  # files may have changed since an earlier command in this process
    plan = make_plan(arguments)
    every = load_jobs(arguments, plan)
    jobs, reference = with_divergence(arguments, every, select(every, arguments.mask))
    store = None if arguments.dry_run and not arguments.results.is_dir() else Store(arguments.results)
    if reference is None and store is not None and not arguments.clear_cache:
        jobs = as_measured_before(arguments, every, jobs, store)
    tasks, unavailable = make_tasks(jobs)
    harness = tuple(shlex.split(arguments.harness)) if arguments.harness else HARNESS
    if store is None or arguments.dry_run:
        _say_plan(arguments.results, tasks, unavailable, harness, store)
        return 0
    if arguments.clear_cache:
        forget(tasks, store)
    _say_data(plan)
    if reference is not None:
        print(f"Reference: {reference.label}, kept in {reference.folder}", flush=True)
    try:
        with _interruptible(), Display(len(tasks) + len(unavailable)) as display:
            for job, reason in unavailable:
                display.unavailable(job.label, reason, job.source)
            evaluation = _Evaluation(arguments, store, display, harness)
            results, dropped = evaluation.run(tasks)
            if dropped:
                tasks = evaluation.go_on(tasks, dropped, results)
    except KeyboardInterrupt:
        done = sum(store.result(task.key) is not None for task in tasks)
        say(f"stopped: {done} of {len(tasks)} done and kept; the same command goes on from here")
        return INTERRUPTED
    files = [results[task.key] for task in tasks if task.key in results]
    failed = len(unavailable) + len(tasks) - len(files)
    say(f"{len(files)} of {len(tasks) + len(unavailable)} models have a result; see: compare table {arguments.results}")
    if not files:
        return NOTHING_USABLE
    plotted = _plot(arguments, files, plot_file) if arguments.plot or arguments.plot_file else 0
    return plotted or (SOME_FAILED if failed and not arguments.continue_on_error else 0)


@dataclass(frozen=True)
class _Evaluation:
    """Runs what is missing."""

    arguments: argparse.Namespace
    store: Store
    display: Display
    harness: Sequence[str]

    def run(self, tasks: Sequence[Task]) -> tuple[dict[str, Path], list[Task]]:
        """Results by key, kept ones and new ones; and tasks that were dropped, since their reference failed."""
        self.store.show({task.key: [job.shown for job in task.jobs] for task in tasks})
        results, missing = kept_and_missing(tasks, self.store)
        for task in tasks:
            if task.key in results:
                self.display.kept(task, results[task.key])
        outcomes = _launch(self.arguments, missing, self.store, self.display, self.harness)
        results |= {outcome.task.key: outcome.result for outcome in outcomes if outcome.result}
        return results, [outcome.task for outcome in outcomes if outcome.dropped]

    def go_on(self, tasks: list[Task], dropped: list[Task], results: dict[str, Path]) -> list[Task]:
        """Run `dropped` without divergence, if that is still of use; `tasks` as they are then. Adds to `results`.

        Where divergence was asked for by a flag, perplexities alone are not what hours of evaluation are for.
        """
        asked = self.arguments.kld or self.arguments.logits_file
        if asked and not self.arguments.continue_on_error:
            reason = "not run: the reference failed; mend it, or run the others without divergence: --continue-on-error"
            self.display.dropped(dropped, reason, failed=True)
            return tasks
        self.display.dropped(dropped, "run without divergence: the reference failed", failed=False)
        instead, _ = make_tasks([replace(job, divergence=None) for task in dropped for job in task.jobs])
        found, _ = self.run(instead)
        results |= found
        return [task for task in tasks if task not in dropped] + instead


def _launch(
    arguments: argparse.Namespace, tasks: Sequence[Task], store: Store, display: Display, harness: Sequence[str]
) -> list[Outcome]:
    if not tasks:
        return []
    if arguments.launcher == "ray":
        from compare.run.processes.ray_pool import run_on_ray

        chosen = harness if arguments.harness else None  # None: each worker's own Python
        return run_on_ray(tasks, store, display, arguments.ray_address, chosen, arguments.gpu_gb)
    return run_local(tasks, store, display, arguments.jobs, harness)


def _say_plan(
    root: Path,
    tasks: Sequence[Task],
    unavailable: Sequence[tuple[Job, str]],
    harness: Sequence[str],
    store: Store | None,
) -> None:
    missing = list(tasks) if store is None else kept_and_missing(tasks, store)[1]
    to_run = {task.key: task for task in missing}
    for task in tasks:
        state = "to run" if task.key in to_run else "kept"
        if task.key in to_run and task.after in to_run:
            state += f" after {to_run[task.after].label}"
        for job in task.jobs:
            print(f"{job.label}: {state} ({job.source}, key {task.key})")
        print(f"    {shlex.join([*harness, *task.job.arguments(root / task.key)])}")
    for job, reason in unavailable:
        print(f"{job.label}: not run: {reason} ({job.source})")


def _say_data(plan: RunSettings) -> None:
    data = plan.data
    if data is None or not (data.dataset or data.text_path):
        return
    size = ", ".join(
        words
        for words, said in (
            (f"windows of {data.eval_len} tokens", data.eval_len),
            (f"one every {data.eval_stride}", data.eval_stride),
            (f"the first {data.max_rows}" if data.max_rows else "all of them", True),
            (f"{data.warmup_tokens} tokens of warm-up", data.warmup_tokens),
            ("chat template", data.chat_template),
        )
        if said
    )
    rows = {"keep": "kept", "drop": "dropped"}[plan.blank_rows()]
    print(f"Loading dataset: {data.text_path or data.dataset} ({size}; blank rows {rows})", flush=True)


def _plot_file(arguments: argparse.Namespace) -> Path | None:
    """Where the plot goes, settled before hours of evaluation; None for a window."""
    if arguments.plot_file:
        file: Path = arguments.plot_file
        if file.suffix.lower() not in PICTURE_SUFFIXES:
            raise CompareError(f"-pf {file}: expected a name that ends in .png, .svg, .pdf or .html")
        if not file.parent.is_dir():
            raise CompareError(f"-pf {file}: there is no folder {file.parent}")
        return file
    return None if has_display() else arguments.results / "plot.png"


def _plot(arguments: argparse.Namespace, files: Sequence[Path], plot_file: Path | None) -> int:
    """Draws the results; returns 0, or the exit code of what went wrong, which is said."""
    options = Options(
        metrics=("kld",) if arguments.kld else (),
        axis="vram" if arguments.vram else "bpw",
        max_x=arguments.max_x,
        max_y=arguments.max_y,
    )
    try:
        write_plot(files, options, PlotRequest(plot_file, arguments.title, arguments.dark))
    except CompareError as error:
        say(str(error))
        return error.exit_code
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does: processes stopped, finished models kept.

    A signal that is ignored when the run starts stays so: `nohup compare run` outlives its terminal.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
