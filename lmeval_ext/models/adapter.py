"""The contract: what an engine must implement so that the harness can evaluate it, and what every adapter inherits.

An adapter implements the four abstract members of `Adapter`. An engine without a harness class of its own builds on
`TokenLM` (token_lm.py); an engine whose distributions can be stored or measured adds `Observed` (observed.py).
README.md in this folder lists the steps.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.models import harness_models  # noqa: F401 (gives every LM the method `score_token_windows`)
from lmeval_ext.models.record import Quantization, result_block
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores, check_length

logger = logging.getLogger(__name__)


class Adapter(TemplateLM):
    """A harness model that scores token windows and describes itself in the result file.

    It comes before the harness class in the bases (`class HFQuantized(Observed, HFLM)`): windows are scored here, all
    other requests pass through to the harness class.
    """

    label: str | None = None
    bar: Any = None  # a progress bar that spans several calls of `score_windows`
    _window_tokens = 0
    _window_seconds = 0.0
    _loglikelihoods = _nan_loglikelihoods = 0

    # ------------------------------------------------------------------ what an engine implements

    @abstractmethod
    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Scores the target tokens of each window, in order: natural-log probabilities in float32.

        All windows fit the model's context and vocabulary. The last token of a window is only predicted, so an engine
        has to be fed the tokens before it alone.
        """

    @abstractmethod
    def describe(self) -> Quantization:
        """Describes the model, the engine and the device for the result file. Begin with `record.from_storage`."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Size of the model's vocabulary: all token ids are below it, and the softmax runs over it."""

    @abstractmethod
    def checkpoint(self) -> str | None:
        """Path of the model's file or folder; None if it is not local."""

    # ------------------------------------------------------------------ token windows

    @property
    def window_limit(self) -> int:
        """The most tokens that a window of a task may have."""
        return int(self.max_length)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if not requests or not isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        check_windows(requests, self.window_limit, self.vocabulary)
        return self.score_checked(requests)

    def score_checked(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Scores windows that are known to fit. `Observed` overrides it to measure divergence."""
        return self.score_timed(windows)

    def score_timed(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Calls `score_windows` and counts tokens and seconds for `tokens_per_second`."""
        start = time.perf_counter()
        scores = self.score_windows(windows)
        self._window_seconds += time.perf_counter() - start
        self._window_tokens += sum(len(w.ids) for w in windows)
        return scores

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], Any]]:
        """Shows a progress bar over `total` windows; yields a function that takes how many more are done."""
        if self.bar is not None:
            yield self.bar.update
            return
        with tqdm(total=total, desc=f"Scoring windows ({self.label})", unit="window") as bar:
            yield bar.update

    # ------------------------------------------------------------------ the harness' own requests

    def complete_requests(self, requests: Sequence[Any], limit: int | None = None) -> list[Any]:
        """Completes the harness' triples (key, context ids, continuation ids) so that they can be scored.

        A context without tokens gets the prefix token, as an empty text does: of a context of white space alone, the
        harness moves all to the continuation. limit: the most tokens of a continuation; default max_length, as in
        `hf`. Raises UserError for a continuation that is longer, or that is empty because its characters became part
        of the context's last token.
        """
        limit = int(self.max_length if limit is None else limit)
        complete = []
        for index, (key, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= limit:
                text = f" {key[1][:60]!r}" if isinstance(key, tuple) and len(key) > 1 else ""
                problem = "has no tokens" if not continuation else f"has {len(continuation)} tokens, the model {limit}"
                raise UserError(f"the continuation{text} of request {index} {problem}; it cannot be scored")
            complete.append((key, context or [self.prefix_token_id], continuation))
        return complete

    def check_new_tokens(self, max_new: int) -> int:
        """Returns `max_new`, the most tokens to generate. Raises UserError if it leaves no room for a prompt."""
        limit = int(self.max_length)
        if not 0 < max_new < limit:
            raise UserError(
                f"max_gen_toks={max_new}: expected at least 1 and less than the model's max_length={limit}; lower it "
                "with --gen_kwargs max_gen_toks=…, or raise max_length if the model can take it"
            )
        return max_new

    def generate_token_ids(self, requests: Sequence[AnswerRequest]) -> list[list[int]]:
        """The token ids of the answer to each prompt, in order, as `AnswerSettings` asks.

        Raises UserError for a prompt that does not fit the model, or if the engine generates no text.
        """
        for request in requests:
            tokens, limit = len(request.prompt_ids) + request.settings.max_new, int(self.max_length)
            if tokens > limit:
                raise UserError(
                    f"prompt and answer take {tokens} tokens, this model's context holds {limit}; raise max_length "
                    "(max_model_len in vLLM, n_ctx in llama.cpp) if the model can take it, or make shorter answers "
                    "with `compare traces --max-tokens`"
                )
            if max(request.prompt_ids) >= self.vocabulary:
                raise UserError(
                    f"token id {max(request.prompt_ids)} is beyond this model's vocabulary of {self.vocabulary}: the "
                    "prompt was tokenized for another model"
                )
        with tqdm(total=len(requests), desc=f"Answering prompts ({self.label})", unit="prompt") as bar:
            return self.answer_ids(requests, bar.update)

    def answer_ids(self, requests: Sequence[AnswerRequest], done: Callable[[int], Any]) -> list[list[int]]:
        """Answers prompts that are known to fit; an engine that generates text overrides this.

        done: takes how many more are answered. Raises UserError here.
        """
        raise UserError(
            f"the model {type(self).__name__} scores tokens and generates none; leave out own_answers_greedy, whose "
            "figures own_answers has too, from one pass over the stored answers"
        )

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Scores as the harness class does; NaN log-likelihoods are counted and reported in the result."""
        results = super().loglikelihood(requests, *args, **kwargs)
        self._count_nan([total for total, _ in results])
        return results

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Scores as the harness class does; NaN log-likelihoods are counted and reported in the result."""
        results = super().loglikelihood_rolling(requests, *args, **kwargs)
        self._count_nan(results)
        return results

    def _count_nan(self, totals: Sequence[float]) -> None:
        self._loglikelihoods += len(totals)
        nan = sum(1 for total in totals if total != total)
        self._nan_loglikelihoods += nan
        if nan:
            logger.error(
                "%d of %d log-likelihoods are NaN, so the figures made from them mean nothing (damaged weights, or a "
                "dtype that overflows); the result file says so, and compare shows these figures as unknown",
                nan,
                len(totals),
            )

    # ------------------------------------------------------------------ the result file

    def bos_rule(self) -> dict[str, Any] | None:
        """Reports what `tok_encode` puts before a text; None if the tokenizer fails on the probe.

        before_text: ids placed before a text, unless that text begins with the prefix token's own text.
        prefix_token_id: the context of a text that has none, and of a text whose whole log-likelihood is taken.
        add_bos_token: the argument of that name; None: the tokenizer's own default.
        """
        try:
            plain, complete = (list(self.tok_encode("a", add_special_tokens=s)) for s in (False, None))
            at = next(i for i in range(len(complete)) if complete[i : i + len(plain)] == plain)
            return {
                "before_text": complete[:at],
                "prefix_token_id": int(self.prefix_token_id),
                "add_bos_token": getattr(self, "add_bos_token", None),
            }
        except Exception as error:  # scores exist by now and must not be lost
            logger.warning("the ids that the tokenizer puts before a text are unknown: %s", first_line(error))
            return None

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes into `config` of the result file; our part is `quantization`."""
        inherited: dict[str, Any] = getattr(super(), "get_model_info", dict)()
        try:
            facts = self.describe()
        except Exception as error:  # scores exist by now and must not be lost
            logger.exception("describing the model failed; its figures are null in the result file")
            name = type(self).__name__
            facts = Quantization(self.label or name, name, None, notes=[f"unknown: {first_line(error)}"])
        facts.bos = self.bos_rule()
        if self._nan_loglikelihoods:
            facts.nan_loglikelihoods = self._nan_loglikelihoods
            facts.notes.append(
                f"{self._nan_loglikelihoods} of {self._loglikelihoods} log-likelihoods are NaN: figures made from "
                "them mean nothing"
            )
        if self._window_seconds:
            facts.tokens_per_second = self._window_tokens / self._window_seconds
        return {**inherited, "quantization": result_block(facts)}


def check_windows(windows: Sequence[WindowRequest], limit: int, vocabulary: int) -> None:
    """Raises UserError if a window is longer than the model's context or holds an id beyond its vocabulary."""
    check_length(windows, limit)
    largest = max(max(w.ids) for w in windows)
    if largest >= vocabulary:
        raise UserError(
            f"token id {largest} is beyond this model's vocabulary of {vocabulary}: the text was tokenized for another "
            "model; set tokenizer= to the tokenizer of this model"
        )
