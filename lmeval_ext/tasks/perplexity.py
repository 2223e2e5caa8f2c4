"""The Task class of all perplexity tasks: `wiki2_strided`, `sample_strided` and the other YAML files of this folder.

A document is one window, and a request hands its token ids to the model. The metrics are perplexity, top-1 accuracy and
bits per byte, and the divergence from a reference where the model measured it (docs/metrics.md), each with a standard
error. The result's metadata describes the windows that were scored.

`PerplexityTask` follows the harness: `__init__` prepares tokens and windows, `build_all_requests` makes requests,
`process_results` turns the scores of one window into sums, `aggregation` turns sums into metrics, and `dump_config`
writes the metadata.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from compare.metrics import METRICS
from lmeval_ext import metrics, positions
from lmeval_ext.divergence import summary
from lmeval_ext.divergence.summary import WindowDivergence
from lmeval_ext.errors import UserError
from lmeval_ext.metrics import WindowSum
from lmeval_ext.models import harness_models  # noqa: F401 (gives every LM the method `score_token_windows`)
from lmeval_ext.positions import PositionedSum, WindowCurve
from lmeval_ext.requests import REQUEST_TYPE, WindowRequest, WindowScores, window_request
from lmeval_ext.tasks import corpus
from lmeval_ext.tasks.bundled import read_bundled
from lmeval_ext.tasks.protocols import PROTOCOLS, Window, fingerprint, scored_spans, window_ids
from lmeval_ext.tasks.settings import TaskSettings, check_context
from lmeval_ext.tasks.tokenizers import load_tokenizer
from lmeval_ext.tokens import TextTokenizer, TokenSequence, tokenize

logger = logging.getLogger(__name__)

# The harness writes "N/A" as the standard error of an aggregation that it does not know. A metric named METRIC_stderr,
# reported after METRIC, replaces that value (lm_eval.evaluator_utils, 0.4.13).
_STDERR = "_stderr"
UNKNOWN = "N/A"  # the harness' own value; its table cannot print null

# The statistic of window sums for each metric that is formed from them
_STATISTICS = {
    name: metrics.statistic_of(name) for name in ("token_perplexity", "top1_accuracy", "bits_per_byte", *summary.MEANS)
}


class PerplexityTask(Task):
    """Perplexity of a text under a protocol of `lmeval_ext.tasks.protocols`.

    config: the task's YAML with the harness' merged metadata. Raises UserError for settings, texts and tokenizers that
    cannot be used together.
    """

    OUTPUT_TYPE = REQUEST_TYPE  # tells evaluate() which requests to pad across ranks

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self._init_harness_task(config, metadata)
        settings = TaskSettings.of(metadata)
        self.spec = settings.window_spec()
        self._protocol = PROTOCOLS[self.spec.protocol]
        tokenizer = load_tokenizer(metadata)
        self._prefix = tokenizer.chat_prefix() if settings.chat_template else []
        check_context(self.spec.eval_len, metadata, len(self._prefix))
        source = _read_corpus(settings, tokenizer)
        text = source.raw() if self._protocol.raw_text else source.joined(settings.blank_rows)
        tokens = tokenize(text, tokenizer, settings.bos, self._protocol.bos_each)
        self._covers_text = self._protocol.covers_text and not self.spec.warmup_tokens
        record = {
            "protocol": self.spec.protocol,
            "eval_len": self.spec.eval_len,
            "stride": self.spec.stride,
            "max_rows": self.spec.max_rows,
            "warmup_tokens": self.spec.warmup_tokens,
            "blank_rows": None if self._protocol.raw_text else settings.blank_rows,
            "dataset": settings.dataset,
            "max_text_rows": settings.max_text_rows,
            "chat_template": settings.chat_template,
            "prefix_tokens": len(self._prefix),
            "text": source.name,
            "text_sha256": corpus.sha256(text),
            "tokenizer": tokenizer.name,
            "bos": settings.bos,
            "bos_applied": tokens.bos,
        }
        self._set_windows(tokens, self.spec.windows(len(tokens.ids)), self.spec.block_windows, record)

    def _set_windows(
        self, tokens: TokenSequence, windows: list[Window], block_windows: int, record: dict[str, Any]
    ) -> None:
        """Set what is scored. block_windows: as in `metrics.standard_error`. record: the settings, for the result."""
        self.tokens, self.windows, self._block_windows = tokens, windows, block_windows
        self._settings_record = record
        self._scored = windows  # fewer with --limit or --samples
        self._nonfinite = 0
        self._errors: dict[str, float | None] = {}
        self._divergence: dict[str, Any] | None = None
        self._by_position: dict[str, Any] | None = None

    def _init_harness_task(self, config: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Set the attributes that the harness reads.

        Task.__init__ is not called, because it would download a data set and take `config` for the name of a task.
        """
        self.VERSION = metadata.get("version", 0)
        self._config = TaskConfig(
            task=config["task"],
            task_alias=config.get("task_alias"),
            output_type="loglikelihood",
            num_fewshot=0,
            metadata=metadata,
        )
        self._instances: list[WindowRequest] | None = None
        self._training_docs = self._fewshot_docs = None
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        self.fewshot_rnd = None

    # ------------------------------------------------------------------ documents and requests

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return [
            {"window": w.index, "start": w.start, "end": w.end, "first_target": w.first_target} for w in self.windows
        ]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return f"tokens {doc['start']} to {doc['end']}, scored from {doc['first_target']}"

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return ""

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        return ""  # the window is the entire prompt: no few-shot examples, no system prompt, no chat template

    def build_all_requests(self, *, limit: int | None = None, samples: list[int] | None = None, **kwargs: Any) -> None:
        """Build the requests as the harness does, but never cached.

        The key of `--cache_requests` does not include text, tokenizer and settings.
        """
        if kwargs.get("apply_chat_template"):
            logger.warning("%s: --apply_chat_template does not apply to token windows; ignored", self.config.task)
        kwargs.update(cache_requests=False, rewrite_requests_cache=False)
        if samples and not all(0 <= index < len(self.windows) for index in samples):
            raise UserError(f"--samples={samples}: this task has windows 0 to {len(self.windows) - 1}")
        self._scored = [w for w in self.windows if w.index in samples] if samples else self.windows[: limit or None]
        super().build_all_requests(limit=limit, samples=samples, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> WindowRequest:
        window = self.windows[doc["window"]]
        ids = window_ids(self.tokens.ids, window, self.tokens.window_bos, self._prefix)
        n_context = len(self._prefix) + window.first_target - window.start
        return window_request(self.doc_to_text(doc), ids, n_context, doc, kwargs["metadata"])

    # ------------------------------------------------------------------ scores

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """Return the sums of one window, by metric; for the error of the perplexity, also by position.

        results: one WindowScores of our models, or (loglikelihood, is_greedy) of the harness' own models.
        """
        window, scores = self.windows[doc["window"]], results[0]
        per_token = isinstance(scores, WindowScores)
        logprobs = np.asarray(scores.logprobs if per_token else [scores[0]], dtype=np.float64)
        if per_token and len(logprobs) != window.scored:
            raise RuntimeError(f"window {window.index}: {len(logprobs)} scores for {window.scored} targets")
        nonfinite = int((~np.isfinite(logprobs)).sum())
        nll = -float(scores[0])
        sums = {"token_perplexity": self._sum(window, nll, window.scored, nonfinite)}
        if per_token:
            sums["top1_accuracy"] = self._sum(window, float(sum(scores.greedy)), window.scored, nonfinite)
        n_bytes = self._scored_bytes(window)
        if n_bytes is not None:  # 0 is valid: all tokens of the window may lie inside one character
            sums["bits_per_byte"] = self._sum(window, nll, n_bytes, nonfinite)
        items: dict[str, Any] = dict(sums)
        by_token = {"token_perplexity": -logprobs}
        if per_token and scores.divergence is not None:
            divergence = WindowDivergence.of(window.index, scores.divergence)
            items |= divergence.sums()
            items |= dict.fromkeys(summary.QUANTILE_METRICS, divergence)
            by_token |= divergence.by_token(finite_only=True)
        given = with_errors(items)
        if per_token:
            position = len(self._prefix) + window.first_target - window.start
            recorded = {name: by_token[name] for name in positions.BY_POSITION if name in by_token}
            curve = WindowCurve.of(window.index, position, recorded)
            given["token_perplexity" + _STDERR] = PositionedSum(sums["token_perplexity"], curve)
        return given

    @staticmethod
    def _sum(window: Window, total: float, count: int, nonfinite: int) -> WindowSum:
        return {"window": window.index, "total": total, "count": count, "nonfinite": nonfinite}

    def _scored_bytes(self, window: Window) -> int | None:
        """Return the UTF-8 bytes of the scored tokens.

        None if the protocol does not score each token once, or the tokenizer does not give byte positions.
        """
        ends = self.tokens.byte_ends
        if ends is None or not self._covers_text:
            return None
        return int(ends[window.end - 1] - ends[window.first_target - 1])

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], Any]]:
        functions: dict[str, Callable[[Sequence[Any]], Any]] = {}
        for metric, statistic in _STATISTICS.items():
            functions[metric] = statistic
            functions[metric + _STDERR] = self.error_of(metric)
        functions["token_perplexity"] = self._perplexity
        functions["token_perplexity" + _STDERR] = self._perplexity_error
        for metric, percent in summary.QUANTILE_METRICS.items():
            functions[metric] = partial(summary.quantile, percent=percent)
            functions[metric + _STDERR] = self._quantile_error_of(metric, percent)
        functions["kld_median"] = self._median_divergence
        return functions

    def _median_divergence(self, values: Sequence[WindowDivergence]) -> float | None:
        """Return the median divergence per token; also records the summary of all divergences."""
        # The harness aggregates the windows of all ranks here, so the record is complete
        self._divergence = summary.describe(values, self._block_windows)
        return summary.quantile(values, 50.0)

    def _quantile_error_of(self, metric: str, percent: float) -> Callable[[Sequence[WindowDivergence]], float | str]:
        """Return the aggregation that gives, and records, the standard error of a quantile; percent: 0 to 100."""

        def error(values: Sequence[WindowDivergence]) -> float | str:
            value = summary.quantile_error(values, percent, self._block_windows)
            self._errors[metric] = value
            return UNKNOWN if value is None else value

        return error

    def _perplexity(self, sums: Sequence[WindowSum]) -> float | None:
        """Return the perplexity; also records how many log-probabilities were not finite."""
        self._nonfinite = sum(s["nonfinite"] for s in sums)  # of all ranks
        return metrics.perplexity(sums)

    def _perplexity_error(self, sums: Sequence[WindowSum]) -> float | str:
        """Return, and record, the perplexity's standard error; also records the figures by position."""
        curves = [item.curve for item in sums if isinstance(item, PositionedSum)]  # none from the harness' own models
        if curves:
            self._by_position = positions.describe(curves, self._block_windows)
        return self.error_of("token_perplexity")(sums)

    def error_of(self, metric: str) -> Callable[[Sequence[WindowSum]], float | str]:
        """Return the aggregation that gives, and records, the standard error of a metric."""

        def error(sums: Sequence[WindowSum]) -> float | str:
            value = metrics.standard_error(sums, metrics.statistic_of(metric), self._block_windows)
            self._errors[metric] = value
            return UNKNOWN if value is None else value

        return error

    def higher_is_better(self) -> dict[str, bool]:
        return directions([*_STATISTICS, *summary.QUANTILE_METRICS])

    # ------------------------------------------------------------------ the record

    def dump_config(self) -> dict[str, Any]:
        """Return the task's config for the result file; its metadata describes the windows that were scored."""
        if self._nonfinite:
            logger.error(
                "%s: %d log-probabilities were NaN or infinite; the perplexity is null, not a mean of the others",
                self.config.task,
                self._nonfinite,
            )
        scored = self._scored
        block = self._block_windows
        self.config.metadata.update(
            self._settings_record,
            windows=len(scored),
            scored_tokens=sum(w.scored for w in scored),
            distinct_tokens=sum(end - first for first, end in scored_spans(scored)),
            tokens_sha256=fingerprint(self.tokens.ids, scored, self.tokens.window_bos, self._prefix),
            nonfinite_logprobs=self._nonfinite,
            standard_error={
                "method": "block bootstrap over windows",
                "block_windows": block,
                "blocks": metrics.count_blocks(len(scored), block),
                **self._errors,
            },
        )
        if self._divergence is not None:
            self.config.metadata["divergence"] = self._divergence
        if self._by_position is not None:
            self.config.metadata["by_position"] = self._by_position
        config: dict[str, Any] = self.config.to_dict()
        return config


def with_errors(items: dict[str, Any]) -> dict[str, Any]:
    """Return each metric's item also under the name of its standard error, which is aggregated from the same items."""
    return {name: item for metric, item in items.items() for name in (metric, metric + _STDERR)}


def directions(metrics: Iterable[str]) -> dict[str, bool]:
    """Whether higher is better, for the metrics of which one direction is."""
    return {name: higher for name in metrics if (higher := METRICS[name].higher_is_better) is not None}


def _read_corpus(settings: TaskSettings, tokenizer: TextTokenizer) -> corpus.Corpus:
    """Read the rows that the settings name, at most `max_text_rows` of them."""
    source = _read_source(settings, tokenizer)
    return source.first(settings.max_text_rows) if settings.max_text_rows else source


def _read_source(settings: TaskSettings, tokenizer: TextTokenizer) -> corpus.Corpus:
    if settings.bundled_text and settings.text_path:
        # One --metadata may serve several tasks, and a task of this name always scores the same text
        logger.warning("text_path=%r is ignored: this task always scores the bundled text", settings.text_path)
    elif settings.text_path is not None:
        return corpus.read_corpus(settings.text_path, settings.text_column)
    if settings.bundled_text:
        return read_bundled(settings.bundled_text, tokenizer)
    return corpus.load_hub_corpus(
        settings.dataset_path,
        settings.dataset_name,
        settings.dataset_split,
        settings.text_column,
        settings.dataset_files,
    )
