"""The original model's own answers: `own_answers` scores them, `own_answers_greedy` lets the model answer again.

The answers come from a trace file (`lmeval_ext.traces`), which --metadata '{"trace": "FILE"}' names. A window is one
prompt with its answer, and the answer's tokens are scored; everything else is `PerplexityTask`'s, references and
divergences included.

If each stored token was the original's first choice, both tasks report where a model's greedy answer leaves the
original's (first divergent token, Deiseroth et al. 2023, arXiv 2311.01544). Up to there both have seen the same tokens,
so one pass over the stored answer finds the place where generation would leave it, but for tokens that are nearly tied:
`own_answers_greedy` generates, as a user's engine would.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from lmeval_ext import metrics
from lmeval_ext.errors import UserError
from lmeval_ext.metrics import WindowSum
from lmeval_ext.requests import (
    ANSWER_TYPE,
    AnswerRequest,
    AnswerSettings,
    WindowRequest,
    WindowScores,
    answer_request,
    window_request,
)
from lmeval_ext.tasks.perplexity import UNKNOWN, PerplexityTask, directions, with_errors
from lmeval_ext.tasks.protocols import Window
from lmeval_ext.tasks.settings import context_limits
from lmeval_ext.tasks.tokenizers import load_tokenizer
from lmeval_ext.tokens import PROBE, TextTokenizer, TokenSequence, tokenizer_sha256
from lmeval_ext.traces import Trace, TraceRow, read_trace

logger = logging.getLogger(__name__)

DIVERGENT_TOKEN = ("first_divergence", "common_prefix", "identical_answers")


class AnswerWindow(WindowRequest):
    """A prompt with its answer."""

    too_long: ClassVar[str] = (
        "a prompt and its answer take {longest} tokens, this model's context holds {limit}{why}; raise max_length "
        "(max_model_len in vLLM, n_ctx in llama.cpp) if the model can take it, or make shorter answers with "
        "`compare traces --max-tokens`"
    )


class OwnAnswersTask(PerplexityTask):
    """Scores the answers of a trace file, given their prompts and the tokens before them.

    config: as for `PerplexityTask`. Raises UserError for a file that is no trace, another tokenizer, and answers beyond
    the model's context.
    """

    PROTOCOL: ClassVar[str] = "own_answers"

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self._init_harness_task(config, metadata)
        if not isinstance(metadata.get("trace"), str):
            raise UserError(
                f"the task {config['task']} needs the original model's answers: make them with `compare traces`, and "
                'name the file with --metadata \'{"trace": "FILE"}\''
            )
        self.trace = read_trace(metadata["trace"])
        tokenizer = load_tokenizer(metadata)
        checked = check_tokenizer(self.trace, tokenizer)
        check_lengths(self.trace, metadata)
        self._covers_text = False
        self._prefix = []
        ids = np.concatenate([np.array([*row.prompt_ids, *row.response_ids], np.int64) for row in self.trace.rows])
        record = {
            "protocol": self.PROTOCOL,
            "text": self.trace.path.name,
            "text_sha256": self.trace.sha256,
            "trace_format": self.trace.format,
            "trace_model": self.trace.model,
            "trace_greedy": self.trace.greedy,
            "longest_window": max(row.tokens for row in self.trace.rows),
            "tokenizer": tokenizer.name,
            "tokenizer_checked": checked,
        }
        self._set_windows(TokenSequence(ids, None, "none", None), windows_of(self.trace.rows), 1, record)

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return f"answer to {self.trace.rows[doc['window']].name!r}"

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> WindowRequest | AnswerRequest:
        row = self.trace.rows[doc["window"]]
        ids = [*row.prompt_ids, *row.response_ids]
        return window_request(
            self.doc_to_text(doc), ids, len(row.prompt_ids), doc, kwargs["metadata"], kind=AnswerWindow
        )

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, WindowSum]:
        items = super().process_results(doc, results)
        if not self.trace.greedy or not isinstance(results[0], WindowScores):
            return items
        window = self.windows[doc["window"]]
        nonfinite = items["token_perplexity"]["nonfinite"]
        return items | divergent_token(window, first_false(results[0].greedy), nonfinite)

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], Any]]:
        return super().aggregation() | self._divergent_token_aggregation()

    def _divergent_token_aggregation(self) -> dict[str, Callable[[Sequence[Any]], Any]]:
        means = dict.fromkeys(DIVERGENT_TOKEN, metrics.token_mean)
        return {**means, **{f"{metric}_stderr": self._spread_of(metric) for metric in DIVERGENT_TOKEN}}

    def _spread_of(self, metric: str) -> Callable[[Sequence[WindowSum]], float | str]:
        """Return the aggregation of the standard error, unknown where all answers have the same value.

        A bootstrap would give 0 there: it never draws what the few answers do not show.
        """
        measured = self.error_of(metric)

        def error(sums: Sequence[WindowSum]) -> float | str:
            if len({s["total"] for s in sums}) > 1:
                return measured(sums)
            self._errors[metric] = None
            return UNKNOWN

        return error

    def higher_is_better(self) -> dict[str, bool]:
        return super().higher_is_better() | directions(DIVERGENT_TOKEN)


class GreedyAnswersTask(OwnAnswersTask):
    """Lets the model answer the prompts of a trace file greedily, and compares token ids with the stored answers."""

    OUTPUT_TYPE = ANSWER_TYPE
    PROTOCOL: ClassVar[str] = "own_answers_greedy"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if not self.trace.greedy:
            how = "is sampled" if self.trace.greedy is False else "does not say that its answers are greedy"
            raise UserError(
                f"trace={str(self.trace.path)!r} {how}, so a greedy answer would differ from it even in the original; "
                "make one with `compare traces --temperature 0`, or run own_answers"
            )

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> AnswerRequest:
        row = self.trace.rows[doc["window"]]
        # Without a stop: where the answer ends is one of its tokens, and is compared as such
        settings = AnswerSettings(len(row.response_ids), stop=False)
        return answer_request(self.doc_to_text(doc), list(row.prompt_ids), settings, doc, kwargs["metadata"])

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, WindowSum]:
        """Return the sums of one answer, by metric. results: its token ids."""
        stored = self.trace.rows[doc["window"]].response_ids
        equal = [a == b for a, b in itertools.zip_longest(stored, results[0])]
        return divergent_token(self.windows[doc["window"]], first_false(equal), 0)

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], Any]]:
        return self._divergent_token_aggregation()

    def higher_is_better(self) -> dict[str, bool]:
        return directions(DIVERGENT_TOKEN)


def divergent_token(window: Window, position: int, nonfinite: int) -> dict[str, WindowSum]:
    """Return what one answer adds to the metrics of `DIVERGENT_TOKEN`, and to their errors.

    position: tokens before the first one that differs; the answer's length if none does, so the mean position is a
    lower bound of how far the answers would stay equal.
    """
    values = {
        "first_divergence": float(position),
        "common_prefix": position / window.scored,
        "identical_answers": float(position == window.scored),
    }
    return with_errors(
        {
            metric: WindowSum(window=window.index, total=value, count=1, nonfinite=nonfinite)
            for metric, value in values.items()
        }
    )


def first_false(values: Iterable[bool]) -> int:
    """Return the index of the first false value; their number if there is none."""
    values = list(values)
    return next((index for index, value in enumerate(values) if not value), len(values))


def windows_of(rows: Sequence[TraceRow]) -> list[Window]:
    """Return one window per answer, in the tokens of all rows one after the other."""
    ends = np.cumsum([row.tokens for row in rows]).tolist()
    return [
        Window(index, end - row.tokens, end, end - len(row.response_ids))
        for index, (row, end) in enumerate(zip(rows, ends, strict=True))
    ]


def check_tokenizer(trace: Trace, tokenizer: TextTokenizer) -> bool:
    """Return whether the trace names its tokenizer by a checksum. Raises UserError if that is another tokenizer's."""
    if trace.tokenizer_sha256 is None:
        logger.warning(
            "trace=%r does not say with which tokenizer it was made; whether that is %r is not checked",
            str(trace.path),
            tokenizer.name,
        )
        return False
    if tokenizer_sha256(tokenizer.encode(PROBE).ids) != trace.tokenizer_sha256:
        raise UserError(
            f"trace={str(trace.path)!r} was made with another tokenizer ({trace.tokenizer!r}) than {tokenizer.name!r}: "
            "its token ids mean other text here; use the traces of this model's own original"
        )
    return True


def check_lengths(trace: Trace, metadata: dict[str, Any]) -> None:
    """Raise UserError for answers beyond the model's context, as far as it is known before the model is loaded."""
    longest = max(row.tokens for row in trace.rows)
    for name, limit in context_limits(metadata):
        if longest > limit:
            raise UserError(AnswerWindow.too_long.format(longest=longest, limit=limit, why=f" ({name})"))
