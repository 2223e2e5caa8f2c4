"""Token windows on every model of the harness, including the harness' own.

`evaluate()` calls the method of a model that has the name of the request's type. Ours are `score_token_windows` and
`generate_token_ids`; importing this module adds them to the harness' `LM`.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from lmeval_ext.errors import UserError
from lmeval_ext.requests import ANSWER_TYPE, REQUEST_TYPE, AnswerRequest, WindowRequest, check_length


@functools.cache
def spare_positions() -> dict[str, int]:
    """Positions of the context that a window has to leave free, by module of the harness' own models.

    Each engine's folder may have a `stock.py` with such a table, `SPARE_POSITIONS`; that file imports nothing.
    """
    table: dict[str, int] = {}
    for file in sorted(Path(__file__).parent.glob("*/stock.py")):
        table |= importlib.import_module(f"{__package__}.{file.parent.name}.stock").SPARE_POSITIONS
    return table


def score_token_windows(model: Any, requests: list[WindowRequest]) -> Any:
    """Scores windows by the model's own token-level method, after a check of their lengths; a method of every `LM`.

    Raises UserError if the model does not score tokens, or if a window is longer than its context: stock models would
    drop the window's start, and score other positions than the result file says.
    """
    # Underscored in lm-eval 0.4.13, but the method that TemplateLM declares abstract and every token-level model
    # implements; tests/tasks/test_perplexity.py fails when it goes.
    score = getattr(model, "_loglikelihood_tokens", None)
    if score is None:
        raise UserError(
            f"the model {type(model).__name__} does not score token ids, which perplexity windows are made of; use "
            "vllm_nvfp4, hf_quant, llamacpp, or the harness' hf or vllm"
        )
    limit = getattr(model, "max_length", None)
    if isinstance(limit, int):
        spare = max(spare_positions().get(kind.__module__, 0) for kind in type(model).__mro__)
        tokens = "the one token" if spare == 1 else f"{spare} tokens"
        check_length(requests, limit - spare, f"less {tokens} that the engine generates" if spare else "")
    return score(requests)


def generate_token_ids(model: Any, requests: list[AnswerRequest]) -> Any:
    """Raises UserError: a method of every `LM`, which our adapters override.

    The harness' own models return text, whose tokens are not known: several sequences of tokens have the same text.
    """
    raise UserError(
        f"the model {type(model).__name__} returns text, not the token ids that it generated; use vllm_nvfp4, "
        "hf_quant, llamacpp, exllamav3 or exllamav2"
    )


setattr(LM, REQUEST_TYPE, score_token_windows)
setattr(LM, ANSWER_TYPE, generate_token_ids)
