"""Groups log-likelihood requests that share tokens, and batches the groups; on token ids alone, without tensors.

Choices of one question share their complete context; questions of one few-shot task share its examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_WORTHWHILE = 16  # for fewer shared tokens, a forward of their own costs more than it saves
_NEIGHBOUR = 0.5  # least part of a context that neighbours have to share


@dataclass
class Group:
    """Requests with the same context.

    context: its tokens but the last. tails: the tokens to feed after it, each tail once: the context's last token, and
    a continuation without its last token. wanted: for each tail, its requests, as (request, target tokens).
    """

    context: tuple[int, ...]
    tails: list[tuple[int, ...]] = field(default_factory=list)
    wanted: list[list[tuple[int, list[int]]]] = field(default_factory=list)

    def add(self, request: int, tail: tuple[int, ...], targets: list[int]) -> None:
        if tail not in self.tails:
            self.tails.append(tail)
            self.wanted.append([])
        self.wanted[self.tails.index(tail)].append((request, targets))


class Batch(NamedTuple):
    """Groups for one call of `Engine.branch`. fits: whether the engine can run them."""

    groups: list[Group]
    fits: bool


def group_requests(requests: Sequence[Any], max_length: int) -> list[Group]:
    """Groups the harness' triples (key, context ids, continuation ids), cut on the left as its `hf` does.

    Triples have at least one token of context, and 1 to max_length of continuation (`Adapter.complete_requests`).
    """
    groups: dict[tuple[int, ...], Group] = {}
    for index, (_, context, continuation) in enumerate(requests):
        whole = tuple((list(context) + list(continuation))[-(max_length + 1) :])
        count = len(continuation)
        context_ids = whole[: len(whole) - count]
        group = groups.setdefault(context_ids, Group(context_ids[:-1]))
        group.add(index, whole[len(context_ids) - 1 : -1], list(continuation))
    return list(groups.values())


def split_groups(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Splits into groups that share enough tokens, sorted so that those that share are neighbours, and all others."""
    ordered = sorted(groups, key=lambda g: g.context)
    common = [common_prefix(a.context, b.context) for a, b in itertools.pairwise(ordered)]
    shared: list[Group] = []
    alone: list[Group] = []
    for i, group in enumerate(ordered):
        beside = max([*common[max(0, i - 1) : i], *common[i : i + 1]], default=0)
        length = len(group.context)
        within = len(group.tails) > 1 and length >= _WORTHWHILE
        (shared if within or beside >= max(_WORTHWHILE, _NEIGHBOUR * length) else alone).append(group)
    return shared, alone


def shared_batches(
    groups: Sequence[Group], budget: int, fits: Callable[[list[Sequence[int]], list[Any]], bool]
) -> Iterator[Batch]:
    """Yields batches of neighbours with at most `budget` tokens that are not shared, if the engine can run them."""
    batch: list[Group] = []
    prefix, tokens = 0, 0
    for group in groups:
        cost = len(group.context) + sum(map(len, group.tails))
        common = min(prefix, common_prefix(batch[0].context, group.context)) if batch else len(group.context)
        loses = prefix >= _WORTHWHILE and common < _NEIGHBOUR * prefix
        candidate = [*batch, group]
        spent = tokens + cost - common * len(candidate)
        if batch and (loses or spent > budget or not _fits(candidate, fits)):
            yield Batch(batch, True)
            batch, prefix, tokens = [], len(group.context), 0
        else:
            prefix = common
        if not batch and not _fits([group], fits):
            yield Batch([group], False)
            continue
        batch.append(group)
        tokens += cost
    if batch:
        yield Batch(batch, True)


def _fits(groups: list[Group], fits: Callable[[list[Sequence[int]], list[Any]], bool]) -> bool:
    return fits([g.context for g in groups], [g.tails for g in groups])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
