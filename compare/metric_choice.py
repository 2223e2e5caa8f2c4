"""Which figure to compare: ``--metric TASK/METRIC`` or ``METRIC``, or the perplexity of the one such task."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from compare.errors import NOTHING_USABLE, CompareError
from compare.records import PERPLEXITY, Record
from compare.text import and_more

_NAMES = {
    "token_perplexity": "Perplexity",
    "word_perplexity": "Word perplexity",
    "byte_perplexity": "Byte perplexity",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "top1_accuracy": "Top-1 accuracy",
    "top1_agreement": "Top-1 agreement",
    "acc": "Accuracy",
    "acc_norm": "Normalized accuracy",
    "exact_match": "Exact match",
    "kld": "KL divergence",
}
# For files that do not say which way is up.
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "kld")


@dataclass(frozen=True)
class MetricChoice:
    """A task and one of its metric keys, ``"token_perplexity,none"``."""

    task: str
    key: str
    higher_is_better: bool | None

    @property
    def metric(self) -> str:
        return self.key.partition(",")[0]

    @property
    def name(self) -> str:
        return _NAMES.get(self.metric, self.metric)

    @property
    def short(self) -> str:
        metric, _, filter_name = self.key.partition(",")
        return metric if filter_name in ("", "none") else self.key


def choose_metric(records: Iterable[Record], wanted: str | None) -> MetricChoice:
    """The metric meant by `wanted`. CompareError lists the choices where it is unknown or ambiguous."""
    records = list(records)
    available = sorted({(record.task, key) for record in records for key in record.metrics})
    asked = wanted.strip() if wanted is not None else PERPLEXITY
    matches = [pair for pair in available if asked in _spellings(*pair)]
    if not matches:
        raise _unknown(available, wanted)
    tasks = {task for task, _ in matches}
    unfiltered = [pair for pair in matches if pair[1].partition(",")[2] in ("", "none")]
    matches = unfiltered if len(tasks) == 1 and unfiltered else matches
    if len(matches) > 1:
        what = f"--metric {asked} is ambiguous" if wanted is not None else "several perplexity tasks"
        raise CompareError(f"{what}; say which: {_choices(matches)}")
    task, key = matches[0]
    return MetricChoice(task, key, _direction(records, task, key))


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
    return and_more([f"{task}/{key.removesuffix(',none')}" for task, key in pairs], limit=12)


def _direction(records: list[Record], task: str, key: str) -> bool | None:
    for record in records:
        if record.task == task and record.metric(key).higher_is_better is not None:
            return record.metric(key).higher_is_better
    return False if any(word in key for word in _LOWER_IS_BETTER) else None
