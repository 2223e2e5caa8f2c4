"""Which tasks of the harness score token windows: ours, read from their YAML files without importing `lmeval_ext`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_LINE = re.compile(r"^(task|tag|group|output_type): *(\S+) *$", re.MULTILINE)
_MEMBER = re.compile(r"^ +- *(\S+) *$", re.MULTILINE)  # a task of a group
_SCORED = "loglikelihood"


def window_tasks(names: Iterable[str]) -> frozenset[str]:
    """The tasks with token windows among `names`; a tag or a group stands for its tasks."""
    tasks = _tasks_by_name()
    return frozenset().union(*(tasks.get(name, frozenset()) for name in names))


@lru_cache(maxsize=1)
def _tasks_by_name() -> dict[str, frozenset[str]]:
    """Our tasks by the names that `--tasks` takes. Empty where lmeval-ext is not installed beside `compare`."""
    package = find_spec("lmeval_ext")  # locates the package without importing it
    if package is None or package.origin is None:
        return {}
    by_name: dict[str, frozenset[str]] = {}
    groups: dict[str, list[str]] = {}
    for file in sorted((Path(package.origin).parent / "tasks").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        fields = dict(_LINE.findall(text))
        if "group" in fields:
            groups[fields["group"]] = _MEMBER.findall(text)
            continue
        if fields.pop("output_type") != _SCORED:
            continue  # it generates
        for name in fields.values():
            by_name[name] = by_name.get(name, frozenset()) | {fields["task"]}
    for group, members in groups.items():
        by_name[group] = frozenset().union(*(by_name.get(member, frozenset()) for member in members))
    return by_name
