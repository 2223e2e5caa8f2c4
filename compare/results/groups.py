"""Groups of the harness, such as mmlu: values that a result file has only for their subtasks.

lm-eval 0.4.13 writes a group's figures among the tasks' and its direct subtasks under ``group_subtasks``, but no
``n-samples``; ``higher_is_better`` and ``n-shot`` are missing for a group whose subtasks are groups that come later
(``evaluator_utils._propagate_higher_is_better``), mmlu among them. The subtasks have all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compare.text import clean

Tree = Mapping[str, tuple[str, ...]]


def group_tree(content: Mapping[str, Any]) -> Tree:
    """Direct subtasks by group, in the file's order."""
    groups = content.get("group_subtasks")
    if not isinstance(groups, dict):
        return {}
    tree = {
        clean(name): tuple(clean(child) for child in children if isinstance(child, str))
        for name, children in groups.items()
        if isinstance(children, list)
    }
    return {name: children for name, children in tree.items() if children}


def leaves(tree: Tree, name: str) -> list[str]:
    """The tasks of a group and of the groups in it, each once; for a task that is not a group, the task itself."""
    tasks: dict[str, None] = {}
    seen: set[str] = set()
    todo = [name]
    while todo:  # an untrusted file may have circular groups
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        children = tree.get(at)
        if children:
            todo += reversed(children)
        else:
            tasks[at] = None
    return list(tasks)


def common(tree: Tree, name: str, value_of: Callable[[str], Any]) -> Any:
    """The value of `name`, or the one that all its tasks share; None where they differ or one has none."""
    own = value_of(name)
    if own is not None or name not in tree:
        return own
    values = [value_of(leaf) for leaf in leaves(tree, name)]
    return values[0] if values and all(value == values[0] for value in values) else None


def total(tree: Tree, name: str, value_of: Callable[[str], int | None]) -> int | None:
    """The value of `name`, or the sum over its tasks; None where one has none."""
    own = value_of(name)
    if own is not None or name not in tree:
        return own
    values = [value_of(leaf) for leaf in leaves(tree, name)]
    return sum(value for value in values if value is not None) if values and None not in values else None
