"""Which figures to compare: ``--metric TASK/METRIC`` or ``METRIC``, or the perplexity of the only task that has one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import METRICS, PERPLEXITY, Metric, metric_named
from compare.results.groups import Tree
from compare.results.records import Record
from compare.text import and_more, shorten

MEAN = "mean"


@dataclass(frozen=True)
class ChosenMetric:
    """A task and one of its metric keys, ``"token_perplexity,none"``; or the mean over the metrics in `averaged`.

    higher_is_better: None where the result files do not tell, or neither direction is better.
    """

    task: str
    key: str
    higher_is_better: bool | None
    averaged: tuple[ChosenMetric, ...] = ()

    @property
    def metric(self) -> str:
        """The key without its filter, ``"token_perplexity"``."""
        return self.key.partition(",")[0]

    @property
    def row(self) -> Metric:
        """The metric's row of `compare.metrics`."""
        return metric_named(self.metric)

    @property
    def filter_name(self) -> str:
        return self.key.partition(",")[2]

    @property
    def name(self) -> str:
        """The title with its unit, as on an axis."""
        if self.averaged:
            names = {metric.name for metric in self.averaged}
            common = f"{names.pop().lower()} " if len(names) == 1 else ""
            return f"Mean {common}of {len(self.averaged)} tasks"
        return self.row.title_with_unit

    @property
    def short(self) -> str:
        return self.metric if self.filter_name in ("", "none") else self.key

    @property
    def label(self) -> str:
        """``gsm8k/exact_match,strict-match``, as --metric takes it."""
        return shorten(f"{self.task}/{self.short}" if self.task else self.short, 120)


def choose_metrics(
    records: Sequence[Record], names: Sequence[str], subtasks: bool, notices: list[str]
) -> list[ChosenMetric]:
    """The metrics called `names` (none: the perplexity), each once; with `subtasks`, those of the groups' subtasks.

    Raises CompareError as `choose_metric` does, and where there is no group to take subtasks of.
    """
    if subtasks:
        if not names:
            raise CompareError("--subtasks needs a group; name it: --metric GROUP/METRIC")
        names = [each for name in names for each in _subtasks(records, name.strip(), notices)]
    metrics = [choose_metric(records, name, notices) for name in names] or [choose_metric(records, None, notices)]
    return list(dict.fromkeys(metrics))


def choose_metric(records: Iterable[Record], name: str | None, notices: list[str]) -> ChosenMetric:
    """The metric called `name`. Raises CompareError that lists the metrics if it is unknown or ambiguous.

    Of a metric with several filters (gsm8k: strict-match, flexible-extract) and none named, the first in the result
    files is taken, which is the task's own order; `notices` gets a line about it.
    """
    records = list(records)
    available = {(record.task, key): record.alias for record in records for key in record.metrics}
    asked = name.strip() if name is not None else PERPLEXITY
    matches = [pair for pair in available if asked in _spellings(*pair)]
    matches = matches or [pair for pair, alias in available.items() if alias and asked in _spellings(alias, pair[1])]
    if not matches:
        raise _unknown(sorted(available), name)
    if len({task for task, _ in matches}) == 1:
        matches = [pair for pair in matches if pair[1].partition(",")[2] in ("", "none")] or matches
        if len(matches) > 1 and len({key.partition(",")[0] for _, key in matches}) == 1:
            shown, *others = [f"{task}/{key}" for task, key in matches]
            notices.append(
                f"{asked} has {len(matches)} filters; shown: {shown}; --metric also takes {and_more(others)}"
            )
            del matches[1:]
    if len(matches) > 1:
        problem = f"--metric {asked} is ambiguous" if name is not None else "several perplexity tasks"
        raise CompareError(f"{problem}; name one of: {_listed(sorted(matches))}")
    task, key = matches[0]
    return ChosenMetric(task, key, _direction(records, task, key, notices))


def _subtasks(records: Sequence[Record], asked: str, notices: list[str]) -> list[str]:
    """``mmlu/acc`` as ``mmlu_stem/acc``, ``mmlu_other/acc``, …; subtasks without that metric are named in `notices`."""
    tree: dict[str, tuple[str, ...]] = {}
    task_of_alias: dict[str, str] = {}
    keys_of_task: dict[str, set[str]] = {}
    for record in records:
        tree.update(record.groups)
        task_of_alias.setdefault(record.alias, record.task)
        keys_of_task.setdefault(record.task, set()).update(record.metrics)
    group, _, metric = asked.rpartition("/")
    group = group if group in tree else task_of_alias.get(group, group)
    if group not in tree:
        groups = f"groups: {and_more(sorted(tree))}" if tree else "these files have no group"
        raise CompareError(f"--metric {asked} --subtasks: expected GROUP/METRIC; {groups}")
    names = []
    for task in _children(tree, group, set(keys_of_task)):
        if any(metric in (key, key.partition(",")[0]) for key in keys_of_task.get(task, ())):
            names.append(f"{task}/{metric}")
        else:
            notices.append(f"left out: {task}, a subtask of {group}: it has no {metric}")
    if not names:
        raise CompareError(f"--metric {asked} --subtasks: no subtask of {group} has {metric}", NOTHING_USABLE)
    return names


def _children(tree: Tree, group: str, with_figures: set[str], seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Direct subtasks; a subtask that is a group without figures is replaced by its own subtasks."""
    for child in tree[group]:
        if child in tree and child not in with_figures and child not in seen:
            yield from _children(tree, child, with_figures, seen | {group, child})
        else:
            yield child


def _spellings(task: str, key: str) -> tuple[str, ...]:
    name = key.partition(",")[0]
    return (f"{task}/{key}", f"{task}/{name}", key, name)


def _unknown(available: list[tuple[str, str]], name: str | None) -> CompareError:
    if name is None:
        return CompareError(
            f"no task with {PERPLEXITY} in these files; give --metric, one of: {_listed(available)}", NOTHING_USABLE
        )
    spellings = sorted({spelling for pair in available for spelling in _spellings(*pair)})
    close = difflib.get_close_matches(name, spellings, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"metrics: {_listed(available)}"
    return CompareError(f"--metric {name}: no such metric in these files; {hint}")


def _listed(pairs: list[tuple[str, str]]) -> str:
    return and_more([shorten(f"{task}/{key.removesuffix(',none')}", 120) for task, key in pairs], limit=12)


def _direction(records: list[Record], task: str, key: str, notices: list[str]) -> bool | None:
    """The direction in the result files, None where they contradict each other; the table's where they give none.

    A metric of the table that has no direction (a mean Δp is best at 0) has none whatever the files say.
    """
    row = metric_named(key.partition(",")[0])
    if row.name in METRICS and row.higher_is_better is None:
        return None
    directions = {record.metric(key).higher_is_better for record in records if record.task == task} - {None}
    if len(directions) == 2:
        notices.append(f"warning: {task}/{key}: some files say that higher is better, others lower; taken as unknown")
        return None
    return directions.pop() if directions else row.higher_is_better
