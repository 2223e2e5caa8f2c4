"""Which figures to compare: ``--metric TASK/METRIC`` or ``METRIC``, or the perplexity of the one such task."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import LOWER_IS_BETTER, NAMES
from compare.results.groups import Tree
from compare.results.records import PERPLEXITY, Record
from compare.text import and_more, shorten

MEAN = "mean"


@dataclass(frozen=True)
class MetricChoice:
    """A task and one of its metric keys, ``"token_perplexity,none"``; or the mean over the choices in `averaged`."""

    task: str
    key: str
    higher_is_better: bool | None
    averaged: tuple[MetricChoice, ...] = ()

    @property
    def metric(self) -> str:
        return self.key.partition(",")[0]

    @property
    def filter_name(self) -> str:
        return self.key.partition(",")[2]

    @property
    def name(self) -> str:
        if self.averaged:
            names = {choice.name for choice in self.averaged}
            what = f"{names.pop().lower()} " if len(names) == 1 else ""
            return f"Mean {what}of {len(self.averaged)} tasks"
        return NAMES.get(self.metric, self.metric)

    @property
    def short(self) -> str:
        return self.metric if self.filter_name in ("", "none") else self.key

    @property
    def label(self) -> str:
        """``gsm8k/exact_match,strict-match``, as --metric takes it."""
        return shorten(f"{self.task}/{self.short}" if self.task else self.short, 120)


def choose_metrics(
    records: Sequence[Record], wanted: Sequence[str], subtasks: bool, notices: list[str]
) -> list[MetricChoice]:
    """The figures meant by `wanted` (none: the perplexity), each once; with `subtasks`, those of groups' subtasks.

    Raises CompareError as `choose_metric` does, and where there is no group to take subtasks of.
    """
    if subtasks:
        if not wanted:
            raise CompareError("--subtasks is for a group; name it: --metric GROUP/METRIC")
        wanted = [each for asked in wanted for each in _subtasks(records, asked.strip(), notices)]
    found = [choose_metric(records, asked, notices) for asked in wanted] or [choose_metric(records, None, notices)]
    return list(dict.fromkeys(found))


def choose_metric(records: Iterable[Record], wanted: str | None, notices: list[str]) -> MetricChoice:
    """The metric meant by `wanted`. CompareError lists the choices where it is unknown or ambiguous.

    Of a metric with several filters (gsm8k: strict-match, flexible-extract) it is the first in the result files,
    which is the task's own order, if none is named; `notices` says so.
    """
    records = list(records)
    available = {(record.task, key): record.alias for record in records for key in record.metrics}
    asked = wanted.strip() if wanted is not None else PERPLEXITY
    matches = [pair for pair in available if asked in _spellings(*pair)]
    matches = matches or [pair for pair, alias in available.items() if alias and asked in _spellings(alias, pair[1])]
    if not matches:
        raise _unknown(sorted(available), wanted)
    if len({task for task, _ in matches}) == 1:
        matches = [pair for pair in matches if pair[1].partition(",")[2] in ("", "none")] or matches
        if len(matches) > 1 and len({key.partition(",")[0] for _, key in matches}) == 1:
            shown, *others = [f"{task}/{key}" for task, key in matches]
            notices.append(f"{asked} has {len(matches)} filters; shown: {shown}; --metric takes {and_more(others)} too")
            del matches[1:]
    if len(matches) > 1:
        what = f"--metric {asked} is ambiguous" if wanted is not None else "several perplexity tasks"
        raise CompareError(f"{what}; say which: {_choices(sorted(matches))}")
    task, key = matches[0]
    return MetricChoice(task, key, _direction(records, task, key, notices))


def _subtasks(records: Sequence[Record], asked: str, notices: list[str]) -> list[str]:
    """``mmlu/acc`` as ``mmlu_stem/acc``, ``mmlu_other/acc``, …; subtasks without that metric are named in `notices`."""
    trees: dict[str, tuple[str, ...]] = {}
    aliases: dict[str, str] = {}
    having: dict[str, set[str]] = {}
    for record in records:
        trees.update(record.groups)
        aliases.setdefault(record.alias, record.task)
        having.setdefault(record.task, set()).update(record.metrics)
    group, _, metric = asked.rpartition("/")
    group = group if group in trees else aliases.get(group, group)
    if group not in trees:
        groups = f"groups: {and_more(sorted(trees))}" if trees else "these files hold no group"
        raise CompareError(f"--metric {asked} --subtasks: expected GROUP/METRIC; {groups}")
    found = []
    for task in _children(trees, group, set(having)):
        if any(metric in (key, key.partition(",")[0]) for key in having.get(task, ())):
            found.append(f"{task}/{metric}")
        else:
            notices.append(f"left out: {task}, a subtask of {group}: it has no {metric}")
    if not found:
        raise CompareError(f"--metric {asked} --subtasks: no subtask of {group} has {metric}", NOTHING_USABLE)
    return found


def _children(tree: Tree, group: str, having: set[str], seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Direct subtasks; of one that is a group without figures of its own, its subtasks."""
    for child in tree[group]:
        if child in tree and child not in having and child not in seen:
            yield from _children(tree, child, having, seen | {group, child})
        else:
            yield child


def _spellings(task: str, key: str) -> tuple[str, ...]:
    name = key.partition(",")[0]
    return (f"{task}/{key}", f"{task}/{name}", key, name)


def _unknown(available: list[tuple[str, str]], wanted: str | None) -> CompareError:
    if wanted is None:
        return CompareError(
            f"no task with {PERPLEXITY} in these files; give --metric, one of: {_choices(available)}", NOTHING_USABLE
        )
    spellings = sorted({spelling for pair in available for spelling in _spellings(*pair)})
    close = difflib.get_close_matches(wanted, spellings, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {_choices(available)}"
    return CompareError(f"--metric {wanted}: no such metric in these files; {hint}")


def _choices(pairs: list[tuple[str, str]]) -> str:
    return and_more([shorten(f"{task}/{key.removesuffix(',none')}", 120) for task, key in pairs], limit=12)


def _direction(records: list[Record], task: str, key: str, notices: list[str]) -> bool | None:
    """What the files say; where they contradict each other, nothing. A mean Δp is best at 0: neither way is better."""
    if key.partition(",")[0] == "mean_delta_p":
        return None
    said = {record.metric(key).higher_is_better for record in records if record.task == task} - {None}
    if len(said) == 2:
        notices.append(f"warning: {task}/{key}: some files say higher is better, others lower; taken as unknown")
        return None
    if said:
        return said.pop()
    return False if any(word in key for word in LOWER_IS_BETTER) else None
