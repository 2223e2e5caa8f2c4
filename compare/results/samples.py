"""What the harness logs of each document (--log_samples), as far as a paired comparison needs it.

``samples_TASK_DATE.jsonl`` stands beside ``results_DATE.json`` (lm_eval/loggers/evaluation_tracker.py, 0.4.13); a line
is a document under one filter. Our perplexity tasks have a window for a document and a sum and a count for its figure;
the harness' own tasks a number, or, of rolling log-likelihoods, the pair (log-likelihood, words or bytes).
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.results.groups import leaves
from compare.results.records import Record
from compare.results.values import mapping, number, scalar, text, whole
from compare.text import and_more, clean, shorten

_MAX_LINE = 64 * 1024 * 1024
# With an output path that ends in .json the harness puts the date behind that file's own name.
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?$")
_HASHES = (("doc_hash", "text"), ("target_hash", "answer"), ("prompt_hash", "prompt"))


class NoSamples(Exception):
    """Why there are none to use, in words for the user."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One window or document: what it adds to a sum and a count, and what must be equal for two to be a pair.

    identity: by name of what is compared, so that a difference can be said.
    """

    total: float
    count: float
    identity: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Samples:
    """Units by what they are called, in order; `windows`: of our perplexity tasks; `pairs`: of sums and counts."""

    units: dict[tuple[str, int], Unit]
    windows: bool
    rolling: bool

    @property
    def zero_or_one(self) -> bool:
        """Whether each unit is a document that is right or wrong."""
        return not self.windows and not self.rolling and all(u.total in (0.0, 1.0) for u in self.units.values())


def samples_file(record: Record, task: str) -> Path:
    """Where the harness puts the samples of a task of this record's run. NoSamples where no such name is possible."""
    if "/" in task or "\\" in task or "\0" in task or len(task) > 200:
        raise NoSamples(f"{shorten(task, 60)!r} is no name of a task that a file could have")
    dated = _DATE.search(record.file.stem)
    date = dated[0] if dated else record.file.stem.removeprefix("results_")
    return record.file.with_name(f"samples_{task}_{date}.jsonl")


def read_samples(record: Record, key: str) -> Samples:
    """The units behind ``record.metrics[key]``. NoSamples says what is missing or does not fit."""
    units: dict[tuple[str, int], Unit] = {}
    kinds: set[str] = set()
    logged: set[str] = set()
    for task in leaves(record.groups, record.task):
        path = samples_file(record, task)
        for number_of_line, line in _lines(path):
            try:
                read = _unit(line, key)
            except ValueError as error:
                raise NoSamples(f"{path}, line {number_of_line}: {error}") from None
            if read is None:
                logged.update(_names(line))
                continue
            index, kind, unit = read
            if (task, index) in units:
                raise NoSamples(f"{path}, line {number_of_line}: document {index} stands there twice")
            units[task, index] = unit
            kinds.add(kind)
    if not units:
        path = samples_file(record, leaves(record.groups, record.task)[0])
        others = f"; they hold {and_more(sorted(logged), 12)}" if logged else ""
        raise NoSamples(f"the samples in {path} hold no {key.removesuffix(',none')}{others}")
    if len(kinds) > 1:
        raise NoSamples(f"the samples beside {record.file} hold {key} in different forms")
    kind = kinds.pop()
    return Samples(dict(sorted(units.items())), kind == "window", kind == "rolling")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise NoSamples(f"{path} is not a regular file")
        with path.open("rb") as stream:
            at = 0
            while raw := stream.readline(_MAX_LINE + 1):
                at += 1
                if len(raw) > _MAX_LINE:
                    raise NoSamples(f"{path}, line {at}: is longer than any sample")
                if raw.strip():
                    yield at, _parse(path, at, raw)
    except FileNotFoundError:
        raise NoSamples(f"{path} is not there: run that evaluation with --log_samples") from None
    except OSError as error:
        raise NoSamples(f"{path} cannot be read ({error.strerror or error})") from None


def _parse(path: Path, at: int, raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise NoSamples(f"{path}, line {at}: is not a sample (not JSON, or cut off)")
    return line


def _unit(line: dict[str, Any], key: str) -> tuple[int, str, Unit] | None:
    """Index, kind and unit of a line; None for one of another filter, or without this metric."""
    metric, _, wanted = key.partition(",")
    filter_name = line.get("filter")
    if metric not in line or (isinstance(filter_name, str) and wanted and clean(filter_name) != wanted):
        return None
    value = line[metric]
    if isinstance(value, dict):
        return _window(line, value)
    index = whole(line.get("doc_id"))
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
    found = _figure(value)
    if found is None and metric.startswith("kld_"):
        raise ValueError(f"{metric} is of all tokens together and has no pairs; --metric kld has")
    if found is None:
        raise ValueError(f"{metric} is not a finite number: {shorten(clean(str(value)), 60)}")
    return index, "document", Unit(found, 1.0, identity)


def _names(line: dict[str, Any]) -> Iterator[str]:
    said = line.get("metrics")
    for name in said if isinstance(said, list) else ():
        if isinstance(name, str) and not name.endswith("_stderr"):
            yield shorten(clean(name), 60)


def _window(line: dict[str, Any], value: dict[str, Any]) -> tuple[int, str, Unit]:
    index, total, count = whole(value.get("window")), number(value.get("total")), whole(value.get("count"))
    if index is None or count is None:
        raise ValueError("has no window, or no count")
    bad = whole(value.get("nonfinite"))
    if bad or total is None:
        raise ValueError(f"window {index}: {bad or 'some'} log-probabilities are not finite")
    place = mapping(line, "doc")
    bounds = [whole(place.get(name)) for name in ("start", "end", "first_target")]
    if None in bounds:
        raise ValueError(f"window {index} does not say where it lies")
    identity = (("place", "-".join(map(str, bounds))), ("scored tokens or bytes", str(count)))
    return index, "window", Unit(total, float(count), identity)


def _figure(value: object) -> float | None:
    """A number; True and False count as 1 and 0."""
    return float(value) if isinstance(value, bool) else number(value)
