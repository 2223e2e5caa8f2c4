"""Groups of the harness, such as mmlu: what a result file says of them only through their subtasks.

lm-eval 0.4.13 writes a group's figures among the tasks' and its direct subtasks under ``group_subtasks``, but no
``n-samples``; ``higher_is_better`` and ``n-shot`` are missing for a group whose subtasks are groups that come later
(``evaluator_utils._propagate_higher_is_better``), mmlu among them. Its subtasks know all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compare.text import clean

Tree = Mapping[str, tuple[str, ...]]


def group_tree(content: Mapping[str, Any]) -> Tree:
    """Direct subtasks by group, in the file's order."""
    said = content.get("group_subtasks")
    if not isinstance(said, dict):
        return {}
    found = {
        clean(name): tuple(clean(child) for child in children if isinstance(child, str))
        for name, children in said.items()
        if isinstance(children, list)
    }
    return {name: children for name, children in found.items() if children}


def leaves(tree: Tree, name: str) -> list[str]:
    """The tasks of a group, groups in it resolved, each once; of a task that is no group, itself."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    todo = [name]
    while todo:  # a file from a stranger may hold groups in circles
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        children = tree.get(at)
        if children:
            todo += reversed(children)
        else:
            found[at] = None
    return list(found)


def common(tree: Tree, name: str, said: Callable[[str], Any]) -> Any:
    """What is said of `name`, or of all its tasks alike; None where they differ or one does not say."""
    own = said(name)
    if own is not None or name not in tree:
        return own
    values = [said(leaf) for leaf in leaves(tree, name)]
    return values[0] if values and all(value == values[0] for value in values) else None


def total(tree: Tree, name: str, said: Callable[[str], int | None]) -> int | None:
    """What is said of `name`, or the sum over its tasks; None where one does not say."""
    own = said(name)
    if own is not None or name not in tree:
        return own
    values = [said(leaf) for leaf in leaves(tree, name)]
    return sum(value for value in values if value is not None) if values and None not in values else None
