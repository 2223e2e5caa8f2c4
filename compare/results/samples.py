"""Reads what the harness logs per document (--log_samples), as far as a paired comparison needs it.

``samples_TASK_DATE.jsonl`` stands beside ``results_DATE.json`` (lm_eval/loggers/evaluation_tracker.py, 0.4.13); a line
is a document under one filter. In this project's perplexity tasks a document is a window, with a sum and a count; the
harness' own tasks log a number, or for rolling log-likelihoods the pair (log-likelihood, words or bytes).
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.metrics import KLD, metric_named
from compare.results.chosen_answer import chosen_answer
from compare.results.groups import leaves
from compare.results.records import Record
from compare.results.values import integer, mapping, number, scalar, text
from compare.text import and_more, clean, shorten

_MAX_LINE = 64 * 1024 * 1024
# With an output path that ends in .json the harness puts the date behind that file's own name.
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?$")
_HASHES = (("doc_hash", "text"), ("target_hash", "answer"), ("prompt_hash", "prompt"))


class NoSamples(Exception):
    """There are no usable samples; the message, for the user, says why."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One window or document: its contribution to a sum and a count, and what must be equal in a pair.

    identity: (name, value) of each property that must be equal; a message gives the name of one that differs. answer:
    the answer that the model chose; None where the samples do not show it. group: questions with an equal one are not
    independent of each other (several on one text); empty where the file names none.
    """

    total: float
    count: float
    identity: tuple[tuple[str, str], ...]
    answer: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Samples:
    """Units by (task, index), in order.

    windows: from this project's perplexity tasks. rolling: (sum, count) pairs of the harness' rolling log-likelihoods.
    """

    units: dict[tuple[str, int], Unit]
    windows: bool
    rolling: bool

    @property
    def zero_or_one(self) -> bool:
        """Whether each unit is a document that is either right or wrong."""
        return not self.windows and not self.rolling and all(u.total in (0.0, 1.0) for u in self.units.values())


def samples_file(record: Record, task: str) -> Path:
    """The path of the samples of a task of this record's run. Raises NoSamples where the task cannot be a file name."""
    if "/" in task or "\\" in task or "\0" in task or len(task) > 200:
        raise NoSamples(f"{shorten(task, 60)!r} is not a task name that a file can have")
    dated = _DATE.search(record.file.stem)
    date = dated[0] if dated else record.file.stem.removeprefix("results_")
    return record.file.with_name(f"samples_{task}_{date}.jsonl")


def read_samples(record: Record, key: str) -> Samples:
    """The units behind ``record.metrics[key]``. Raises NoSamples naming what is missing or does not fit."""
    units: dict[tuple[str, int], Unit] = {}
    kinds: set[str] = set()
    logged: set[str] = set()
    group_field = text(record.run.metadata.get("group_by"))
    for task in leaves(record.groups, record.task):
        path = samples_file(record, task)
        for line_number, line in _lines(path):
            try:
                parsed = _unit(line, key, group_field)
            except ValueError as error:
                raise NoSamples(f"{path}, line {line_number}: {error}") from None
            if parsed is None:
                logged.update(_names(line))
                continue
            index, kind, unit = parsed
            if (task, index) in units:
                raise NoSamples(f"{path}, line {line_number}: document {index} appears twice")
            units[task, index] = unit
            kinds.add(kind)
    if not units:
        path = samples_file(record, leaves(record.groups, record.task)[0])
        others = f"; they have {and_more(sorted(logged), 12)}" if logged else ""
        raise NoSamples(f"the samples in {path} have no {key.removesuffix(',none')}{others}")
    if len(kinds) > 1:
        raise NoSamples(f"the samples beside {record.file} have {key} in different forms")
    kind = kinds.pop()
    return Samples(dict(sorted(units.items())), kind == "window", kind == "rolling")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line. Raises NoSamples where the file or a line cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise NoSamples(f"{path} is not a regular file")
        with path.open("rb") as stream:
            line_number = 0
            while raw := stream.readline(_MAX_LINE + 1):
                line_number += 1
                if len(raw) > _MAX_LINE:
                    raise NoSamples(f"{path}, line {line_number}: is longer than any sample")
                if raw.strip():
                    yield line_number, _parse(path, line_number, raw)
    except FileNotFoundError:
        raise NoSamples(f"{path} does not exist: run that evaluation with --log_samples") from None
    except OSError as error:
        raise NoSamples(f"{path} cannot be read ({error.strerror or error})") from None


def _parse(path: Path, line_number: int, raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise NoSamples(f"{path}, line {line_number}: is not a sample (not JSON, or cut off)")
    return line


def _unit(line: dict[str, Any], key: str, group_field: str) -> tuple[int, str, Unit] | None:
    """Index, kind and unit of a line; None for a line of another filter, or without this metric."""
    metric, _, key_filter = key.partition(",")
    filter_name = line.get("filter")
    if metric not in line or (isinstance(filter_name, str) and key_filter and clean(filter_name) != key_filter):
        return None
    if metric_named(metric).formula is None:
        raise ValueError(f"{metric} is formed from all tokens at once and has no pairs; --metric {KLD} has")
    value = line[metric]
    if isinstance(value, dict):
        return _window(line, value)
    index = integer(line.get("doc_id"))
    if index is None:
        raise ValueError("has no doc_id")
    identity = tuple((name, text(line.get(field))) for field, name in _HASHES)
    if not identity[0][1]:
        raise ValueError("has no doc_hash")
    if isinstance(value, list) and len(value) == 2:
        total, count = number(value[0]), number(value[1])
        if total is None or count is None or count < 0:
            raise ValueError(f"{metric} is not a sum and a count")
        return index, "rolling", Unit(total, count, (*identity, ("length", scalar(count))))
    figure = float(value) if isinstance(value, bool) else number(value)  # True and False count as 1 and 0
    if figure is None:
        raise ValueError(f"{metric} is not a finite number: {shorten(clean(str(value)), 60)}")
    answer = chosen_answer(line, metric, figure) if figure in (0.0, 1.0) else None
    return index, "document", Unit(figure, 1.0, identity, answer, _group(line, group_field))


def _group(line: dict[str, Any], field: str) -> str:
    """The group of questions that are not independent: the document's field that the task names as
    ``metadata.group_by``, or the paragraph of a document's ``idx`` (MultiRC, ReCoRD); empty without one."""
    document = mapping(line, "doc")
    return scalar(document.get(field)) if field else scalar(mapping(document, "idx").get("paragraph"))


def _names(line: dict[str, Any]) -> Iterator[str]:
    """The metrics that a line has, without their standard errors."""
    names = line.get("metrics")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and not name.endswith("_stderr"):
            yield shorten(clean(name), 60)


def _window(line: dict[str, Any], value: dict[str, Any]) -> tuple[int, str, Unit]:
    """Index, kind and unit of a window. Raises ValueError where it is incomplete or not finite."""
    index, total, count = integer(value.get("window")), number(value.get("total")), integer(value.get("count"))
    if index is None or count is None:
        raise ValueError("has no window, or no count")
    nonfinite = integer(value.get("nonfinite"))
    if nonfinite or total is None:
        raise ValueError(f"window {index}: {nonfinite or 'some'} log-probabilities are not finite")
    place = mapping(line, "doc")
    bounds = [integer(place.get(name)) for name in ("start", "end", "first_target")]
    if None in bounds:
        raise ValueError(f"window {index} lacks start, end or first_target")
    identity = (("place", "-".join(map(str, bounds))), ("scored tokens or bytes", str(count)))
    return index, "window", Unit(total, float(count), identity)
