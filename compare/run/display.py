"""Prints the progress of a run: one line per finished model, and on a terminal a live panel below them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from compare.metrics import METRICS, metric_named
from compare.results.label_index import Presentation
from compare.results.reading import read_file
from compare.results.records import Record
from compare.run.plan.task import Task
from compare.run.processes.outcome import Outcome
from compare.run.processes.progress import duration
from compare.text import clean, shorten


class Display:
    """Prints the progress of a run. On a terminal, a live panel shows the queue; elsewhere, every step is a line.

    total: tasks of this command, including those that have a result already. terminal: None: as stdout is.
    """

    def __init__(self, total: int, terminal: bool | None = None) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self._seconds: list[float] = []
        self._began = time.monotonic()
        self._live = None
        if sys.stdout.isatty() if terminal is None else terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False), refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    # ------------------------------------------------------------------ finished tasks

    def kept(self, task: Task, result: Path) -> None:
        """Report a result of an earlier run that is used again."""
        self.done += 1
        self._print_result(task, result, "kept")

    def unavailable(self, label: str, reason: str, source: str) -> None:
        """Report a model that cannot be run. source: its entry in the spec."""
        self.failed += 1
        self._print(f"{label}: not run: {reason} ({source})")

    def dropped(self, tasks: Sequence[Task], reason: str, failed: bool) -> None:
        """Report tasks that are not run as asked. failed: they are not run at all, so they count as failed."""
        self.failed += len(tasks) if failed else 0
        self._print(f"{', '.join(task.labels for task in tasks)}: {reason}")

    def started(self, task: Task) -> None:
        """Report a start; the live panel shows it by itself."""
        if self._live is None:
            self._print(f"Loading: {task.job.checkpoint} ({task.label})")

    def finished(self, outcome: Outcome) -> None:
        """Report the figures of a result; or the reason of a failure, with log lines, a hint and the log file."""
        if outcome.result is not None:
            self.done += 1
            self._seconds.append(outcome.seconds)
            self._print_result(outcome.task, outcome.result, duration(outcome.seconds))
            return
        self.failed += 1
        self._print(f"{outcome.task.labels}: failed after {duration(outcome.seconds)}: {shorten(outcome.reason, 300)}")
        for line in outcome.lines:
            self._print(f"    | {shorten(line, 200)}")
        if outcome.hint:
            self._print(f"    hint: {outcome.hint}")
        if outcome.log is not None:
            self._print(f"    log: {outcome.log}")

    def _print_result(self, task: Task, result: Path, remark: str) -> None:
        for job in task.jobs:
            self._print(f"{job.label}: {describe(result, job.shown)} ({remark})")

    # ------------------------------------------------------------------ running tasks

    def running(self, states: Sequence[tuple[Task, str]], waiting: Sequence[Task]) -> None:
        """Update the live panel. states: each running task with its state in words."""
        if self._live is None:
            return
        from rich.console import Group
        from rich.text import Text

        lines = [Text(f"  {clean(task.label)}: {state}", style="cyan") for task, state in states]
        self._live.update(Group(*lines, Text(self._queue(len(states), waiting), style="dim")))

    def _queue(self, running: int, waiting: Sequence[Task]) -> str:
        """``"1 of 3 done, 1 waiting (Model c), about 2 min to go, 40 s so far"``; running: number of processes."""
        parts = [f"{self.done} of {self.total} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if waiting:
            names = ", ".join(clean(task.label) for task in waiting[:3])
            parts.append(f"{len(waiting)} waiting ({names}{', …' if len(waiting) > 3 else ''})")
        if self._seconds and running:
            mean = sum(self._seconds) / len(self._seconds)
            parts.append(f"about {duration(mean * (len(waiting) + running) / running)} to go")
        parts.append(f"{duration(time.monotonic() - self._began)} so far")
        return ", ".join(parts)

    def _print(self, text: str) -> None:
        line = clean(text) if not text.startswith("    ") else "    " + clean(text)
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.console.print(line, markup=False, soft_wrap=True)


def describe(result: Path, shown: Presentation) -> str:
    """One line: ``"4.50 bpw (decoder), 16.00 bpw (head), perplexity 31.706900 ± 0.430, 1,234 tokens/s"``."""
    records = [shown.apply(record) for record in read_file(result)]
    q = records[0].quantization
    words = [
        f"{bits:.2f} bpw ({part})"
        for bits, part in ((q.layer_bpw, "decoder"), (q.head_bpw, "head"))
        if bits is not None
    ] or ["bpw unknown"]
    words += [figure for record in records for figure in _figures(record, len(records) > 1)]
    if q.tokens_per_second:
        words.append(f"{q.tokens_per_second:,.0f} tokens/s")
    return ", ".join(words)


def _figures(record: Record, several: bool) -> Iterator[str]:
    """The perplexity and the divergence of a task; of others, the first figure. several: name the task."""
    keys = {key.partition(",")[0]: key for key in reversed(record.metrics)}
    shown = [keys[name] for name, row in METRICS.items() if row.progress and name in keys]
    for key in shown or [next(iter(record.metrics))]:
        metric, row = record.metric(key), metric_named(key.partition(",")[0])
        words = row.progress or f"{record.task} {row.name}"
        if row.progress and several:
            words = f"{record.task} {words}"
        if metric.value is None:
            yield f"{words} unknown (not finite)"
        else:
            error = f" ± {metric.stderr:.{row.progress_digits}f}" if metric.stderr else ""
            yield f"{words} {metric.value:.6f}{error}"
