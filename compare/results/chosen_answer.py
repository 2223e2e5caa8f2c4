"""The answer that a model chose, from a line of the harness' samples.

``filtered_resps`` holds, per request, what the filter kept: for multiple choice the pair (log-likelihood, greedy) of
each choice, for generated answers the extracted text. lm_eval/loggers/evaluation_tracker.py (0.4.13) writes both as
texts. The choice follows from the log-likelihoods as in ``ConfigurableTask.process_results`` (lm_eval/api/task.py):
``acc`` takes the largest, ``acc_norm`` and ``acc_bytes`` the largest per character and per byte of the choice.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable
from typing import Any

_LONG = 80  # longer texts are kept as a digest
_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8", "surrogatepass")),
}


def chosen_answer(line: dict[str, Any], metric: str, figure: float) -> str | None:
    """The chosen answer: the number of the choice, or the extracted text. None where the line does not show it, or
    shows another one than `figure`, 1 for right and 0 for wrong, allows."""
    responses = line.get("filtered_resps")
    if not isinstance(responses, list) or not responses:
        return None
    pairs = [_loglikelihood(response) for response in responses]
    if all(pair is None for pair in pairs):
        return _text(responses[0]) if len(responses) == 1 else None
    length = _LENGTHS.get(metric)
    values = [value for value in pairs if value is not None]
    if length is None or len(values) < len(pairs) or len(values) < 2:
        return None
    choices = _choices(line.get("arguments"), len(values))
    if metric != "acc" and choices is None:
        return None
    sizes = [length(choice) for choice in choices] if choices is not None and metric != "acc" else [1] * len(values)
    if not all(sizes):
        return None
    scores = [value / size for value, size in zip(values, sizes, strict=True)]
    chosen = scores.index(max(scores))
    return str(chosen) if _agrees(line.get("target"), chosen, choices, figure) else None


def _loglikelihood(response: object) -> float | None:
    """The log-likelihood of a (log-likelihood, greedy) pair; None for anything else, and for NaN."""
    if not isinstance(response, list) or len(response) != 2 or str(response[1]) not in ("True", "False"):
        return None
    try:
        value = float(response[0])
    except (TypeError, ValueError):
        return None
    return None if math.isnan(value) else value


def _text(response: object) -> str:
    text = response if isinstance(response, str) else repr(response)
    return text if len(text) <= _LONG else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _choices(arguments: object, count: int) -> list[str] | None:
    """The texts of the choices, without the blank that separates them from the question; None if they are not logged.

    The arguments of a request are (context, continuation): lists up to 0.4.2, later objects of ``arg_0``, ``arg_1``.
    """
    if isinstance(arguments, dict):
        requests = [arguments.get(f"gen_args_{i}") for i in range(count)]
        second = [request.get("arg_1") if isinstance(request, dict) else None for request in requests]
    elif isinstance(arguments, list) and len(arguments) == count:
        second = [request[1] if isinstance(request, list) and len(request) == 2 else None for request in arguments]
    else:
        return None
    texts = [text for text in second if isinstance(text, str)]
    if len(texts) < count:
        return None
    return [text[1:] for text in texts] if all(text.startswith(" ") for text in texts) else texts


def _agrees(target: object, chosen: int, choices: list[str] | None, figure: float) -> bool:
    """Whether the choice is right exactly where the figure says so; True where the right answer is not logged.

    target: as the harness writes it, the text of a number, of a list of numbers, or of the choice.
    """
    if not isinstance(target, str):
        return True
    try:
        right = ast.literal_eval(target)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        right = target
    if isinstance(right, int):
        return (chosen == right) == bool(figure)
    if isinstance(right, list) and right and all(isinstance(each, int) for each in right):
        return (chosen in right) == bool(figure)
    if choices is not None and target in choices:
        return (choices.index(target) == chosen) == bool(figure)
    return True
