"""The command itself: specs to tasks, tasks to results, results to the plot."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from compare.commands.common import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.run.display import Display
from compare.run.fingerprint import fingerprint
from compare.run.harness import HARNESS
from compare.run.jobs import Job, Plan
from compare.run.loading import load_data, load_models
from compare.run.pool import Outcome, Task, run_local
from compare.run.store import Store

SOME_FAILED = 3
INTERRUPTED = 130


def run_command(arguments: argparse.Namespace) -> int:
    """Run ``compare run`` and return its exit code. Raises CompareError for what the user can mend."""
    if arguments.kld or arguments.logits_file:
        raise CompareError("-kld and -lf: KL divergence is not available yet; leave them out to compare perplexities")
    plot_file = _plot_file(arguments)
    fingerprint.cache_clear()  # files may have changed since an earlier command in this process
    plan = _plan(arguments)
    jobs = _select(_jobs(arguments, plan), arguments.mask)
    tasks, unavailable = _tasks(jobs)
    harness = tuple(shlex.split(arguments.harness)) if arguments.harness else HARNESS
    if arguments.dry_run:
        _say_plan(arguments.results, tasks, unavailable, harness)
        return 0
    store = Store(arguments.results)
    if arguments.clear_cache:
        for task in tasks:
            store.forget(task.key)
    store.show({task.key: [job.shown for job in task.jobs] for task in tasks})
    _say_data(plan)
    try:
        with _interruptible(), Display(len(tasks) + len(unavailable)) as display:
            results, missing = _kept(tasks, store, display)
            for job, reason in unavailable:
                display.unavailable(job.label, reason, job.source)
            outcomes = _launch(arguments, missing, store, display, harness)
    except KeyboardInterrupt:
        done = sum(store.result(task.key) is not None for task in tasks)
        say(f"stopped: {done} of {len(tasks)} done and kept; the same command goes on from here")
        return INTERRUPTED
    results |= {outcome.task.key: outcome.result for outcome in outcomes if outcome.result}
    files = [results[task.key] for task in tasks if task.key in results]
    failed = len(unavailable) + len(tasks) - len(files)
    say(f"{len(files)} of {len(tasks) + len(unavailable)} models have a result; see: compare table {arguments.results}")
    if not files:
        return NOTHING_USABLE
    plotted = _plot(arguments, files, plot_file) if arguments.plot or arguments.plot_file else 0
    return plotted or (SOME_FAILED if failed and not arguments.continue_on_error else 0)


def _plan(arguments: argparse.Namespace) -> Plan:
    data = load_data(arguments.data) if arguments.data else None
    return Plan(data, arguments.data, tuple(arguments.tasks or ()), arguments.limit, arguments.log_samples)


def _jobs(arguments: argparse.Namespace, plan: Plan) -> list[Job]:
    entries, problems = load_models(arguments.models)
    if problems and not (arguments.continue_on_error and entries):
        raise CompareError("; ".join(problems))
    for problem in problems:
        say(f"left out: {problem}")
    return [plan.job(entry) for entry in entries]


def _select(jobs: Sequence[Job], mask: str | None) -> list[Job]:
    """Jobs whose label contains a string of `mask`, any case; references first, as in compare_q."""
    wanted = [part.upper() for part in (mask or "").split(";") if part]
    chosen = [job for job in jobs if not wanted or any(part in job.label.upper() for part in wanted)]
    if not chosen:
        labels = ", ".join(job.label for job in jobs[:12])
        raise CompareError(f'-mask "{mask}": no label contains any of these strings; labels: {labels}')
    return sorted(chosen, key=lambda job: not job.first)


def _tasks(jobs: Sequence[Job]) -> tuple[list[Task], list[tuple[Job, str]]]:
    """Jobs by key, and those that cannot be run, each with the reason."""
    by_key: dict[str, list[Job]] = {}
    unavailable: list[tuple[Job, str]] = []
    for job in jobs:
        if job.unavailable:
            unavailable.append((job, job.unavailable))
            continue
        try:
            by_key.setdefault(job.key(), []).append(job)
        except OSError as error:
            unavailable.append((job, f"{error.filename}: cannot be read ({error.strerror or error})"))
    for same in by_key.values():
        if len(same) > 1:
            say(f"{', '.join(job.label for job in same)}: the same model; run once, shown under each label")
    return [Task(key, tuple(same)) for key, same in by_key.items()], unavailable


def _kept(tasks: Sequence[Task], store: Store, display: Display) -> tuple[dict[str, Path], list[Task]]:
    results: dict[str, Path] = {}
    missing: list[Task] = []
    for task in tasks:
        found = store.result(task.key, task.job.log_samples)
        if found is None:
            missing.append(task)
        else:
            results[task.key] = found
            display.kept(task, found)
    return results, missing


def _launch(
    arguments: argparse.Namespace, tasks: Sequence[Task], store: Store, display: Display, harness: Sequence[str]
) -> list[Outcome]:
    if not tasks:
        return []
    if arguments.launcher == "ray":
        from compare.run.ray_pool import run_on_ray

        chosen = harness if arguments.harness else None  # None: each worker's own Python
        return run_on_ray(tasks, store, display, arguments.ray_address, chosen, arguments.gpu_gb)
    return run_local(tasks, store, display, arguments.jobs, harness)


def _say_plan(
    root: Path, tasks: Sequence[Task], unavailable: Sequence[tuple[Job, str]], harness: Sequence[str]
) -> None:
    store = Store(root) if root.is_dir() else None
    for task in tasks:
        done = store is not None and store.result(task.key, task.job.log_samples) is not None
        for job in task.jobs:
            print(f"{job.label}: {'kept' if done else 'to run'} ({job.source}, key {task.key})")
        print(f"    {shlex.join([*harness, *task.job.arguments(root / task.key)])}")
    for job, reason in unavailable:
        print(f"{job.label}: not run: {reason} ({job.source})")


def _say_data(plan: Plan) -> None:
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
        if file.suffix.lower() not in (".png", ".svg", ".pdf", ".html"):
            raise CompareError(f"-pf {file}: expected a name that ends in .png, .svg, .pdf or .html")
        if not file.parent.is_dir():
            raise CompareError(f"-pf {file}: there is no folder {file.parent}")
        return file
    display = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return None if display else arguments.results / "plot.png"


def _plot(arguments: argparse.Namespace, files: Sequence[Path], plot_file: Path | None) -> int:
    from compare.cli import build_parser

    words = ["plot", *map(str, files)]
    if arguments.vram:
        words += ["--x", "vram"]
    for name in ("title", "max_x", "max_y"):
        value = getattr(arguments, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    if arguments.dark:
        words.append("--dark")
    if plot_file is not None:
        words += ["-o", str(plot_file)]
    chosen = build_parser().parse_args(words)
    try:
        return int(chosen.run(chosen))
    except CompareError as error:
        say(str(error))
        return error.exit_code


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
