"""What every adapter adds to its harness class: window scoring, and `quantization` in the result file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.requests import WindowRequest, WindowScores, check_length
from lmeval_ext.storage import StorageError, StorageInfo, inspect
from lmeval_ext.storage.kv_cache import kv_cache

if TYPE_CHECKING:
    import torch

    from lmeval_ext.divergence.head import OutputHead
    from lmeval_ext.divergence.observer import Observer
    from lmeval_ext.divergence.plan import Plan
    from lmeval_ext.divergence.store import ReferenceStore

logger = logging.getLogger(__name__)

GIB = 1024**3


@dataclass
class Quantization:
    """`config.quantization` of a result file: what was run, how many bits it has, what it took.

    Bits per weight and sizes follow `lmeval_ext.storage.StorageInfo`. weight_vram_gb: measured GiB that loading took.
    peak_vram_gb: measured GiB of weights and activations, without the engine's preallocated KV pool (kv_pool_gb).
    layer_parameters: logical elements of the decoder's matrices, the same for every quantization of one model.
    kv_bytes_per_token: what a token takes in a KV cache of kv_cache_dtype (`lmeval_ext.storage.kv_cache`). bos: the
    rule by which texts of the harness' own requests became tokens, as `WindowScoring.bos_rule` gives it; token windows
    have their own, in the task's metadata. nan_loglikelihoods: answers that were NaN, of which the harness makes
    accuracies all the same. None: unknown; `notes` says why.
    """

    label: str
    engine: str
    engine_version: str | None
    family: str | None = None
    scheme: str | None = None
    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = None
    file_bpw: float | None = None
    weight_bytes: int | None = None
    layer_parameters: int | None = None
    kv_bytes_per_token: int | None = None
    kv_cache_dtype: str | None = None
    kernel: str | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    scoring: str | None = None
    bos: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    weight_vram_gb: float | None = None
    peak_vram_gb: float | None = None
    kv_pool_gb: float | None = None
    nan_loglikelihoods: int = 0
    notes: list[str] = field(default_factory=list)


class WindowScoring:
    """Mixin that goes before a harness model class.

    The adapter implements `score_windows` and `describe`; requests of all other kinds pass through to the
    harness class.
    """

    label: str | None = None
    reference_arguments = ReferenceArguments()
    # What the engine can show of a window: its final hidden states, which are small and exact, or its logits alone
    reference_modes: tuple[str, ...] = ("hidden", "logits")
    observer: Observer | None = None  # looks at the logits of windows while they are scored
    bar: Any = None  # the progress bar of several calls of score_windows
    _window_tokens = 0
    _window_seconds = 0.0
    _answers = _nan_answers = 0
    _observed_head: OutputHead | None = None

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Natural-log probabilities in float32 of the target tokens of each window, in order.

        All windows fit into the model's context and vocabulary (checked before).
        """
        raise NotImplementedError

    def describe(self) -> Quantization:
        """What this model is and what it ran on."""
        raise NotImplementedError

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if not requests or not isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]
        check_windows(requests, self.window_limit, self.vocabulary)
        return self._score_with_reference(requests) if self.reference_arguments.active else self.score_timed(requests)

    def score_timed(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """`score_windows`, counted for `tokens_per_second`."""
        start = time.perf_counter()
        scores = self.score_windows(windows)
        self._window_seconds += time.perf_counter() - start
        self._window_tokens += sum(len(w.ids) for w in windows)
        return scores

    # ------------------------------------------------------------------ references (lmeval_ext.divergence)

    def _score_with_reference(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        try:
            from lmeval_ext.divergence import session
        except ImportError as error:
            raise MissingEngineError(
                f"reference= and save_reference= need torch and safetensors ({first_line(error)}): pip install "
                "'lmeval-ext[quant]'"
            ) from error
        return session.score(self, windows)

    def scoring_order(self, windows: Sequence[WindowRequest]) -> list[int]:
        """Indices in the order in which `score_windows` comes to them, in which a reference is best read."""
        return list(range(len(windows)))

    @property
    def windows_at_once(self) -> int:
        """Windows that a reference is best written from at a time; more for a GPU, which idles with one."""
        return 1

    @property
    def tokenizer_may_differ(self) -> bool:
        """Whether the engine's own tokenizer may cut some texts otherwise than the original's does."""
        return False

    @property
    def logits_device(self) -> torch.device | None:
        """Where an observer will see logits, if that is known before: the reference is brought there meanwhile."""
        return None

    def output_head(self) -> OutputHead:
        """The model's output matrix and what follows it. UserError where it has none of its own to show."""
        raise NotImplementedError

    def checkpoint(self) -> str | None:
        """The model's file or folder; None where it is no local one."""
        raise NotImplementedError

    def observe_windows(self, plan: Plan) -> dict[str, Any]:
        """Look at the logits of windows scored from now on. Returns `head_facts` where a plan needs them."""
        from lmeval_ext.divergence.plan import cut_head, head_facts

        head = cut_head(self.output_head(), self.vocabulary) if plan.needs_head else None
        self._observed_head, self.observer = head, plan.observer(head, self.logits_device)
        return {} if head is None else head_facts(head)

    def write_head(self, store: ReferenceStore) -> None:
        """Write the output matrix of the windows observed."""
        assert self._observed_head is not None
        store.write_head(self._observed_head)

    def take_states(self, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """What was kept of windows while a plan saved them; tokens: how many each has, by its key."""
        return {key: self.observer.take(key, count) for key, count in tokens.items()}  # type: ignore[union-attr]

    def stop_observing(self) -> None:
        if self.observer is not None:
            self.observer.close()
        self.observer = self._observed_head = None

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], Any]]:
        """A bar over `total` windows; yields what is told how many more are done."""
        if self.bar is not None:
            yield self.bar.update
            return
        with tqdm(total=total, desc=f"Scoring windows ({self.label})", unit="window") as bar:
            yield bar.update

    def complete_requests(self, requests: Sequence[Any], limit: int | None = None) -> list[Any]:
        """The harness' triples (key, context ids, continuation ids), ready to be scored.

        A context without tokens (white space alone: the harness moves it to the continuation) gets the prefix token,
        as an empty one does. limit: the most tokens of a continuation; default max_length, as in `hf`.
        Raises UserError for a continuation that is empty (its characters went into the context's last token) or longer.
        """
        limit = int(self.max_length if limit is None else limit)  # type: ignore[attr-defined]
        complete = []
        for index, (key, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= limit:
                about = f" {key[1][:60]!r}" if isinstance(key, tuple) and len(key) > 1 else ""
                problem = "has no tokens" if not continuation else f"has {len(continuation)} tokens, the model {limit}"
                raise UserError(f"the continuation{about} of request {index} {problem}; it cannot be scored")
            complete.append((key, context or [self.prefix_token_id], continuation))  # type: ignore[attr-defined]
        return complete

    def check_new_tokens(self, most: int) -> int:
        """`most`, the longest answer asked for. UserError where it leaves no room for a prompt, which would be lost."""
        limit = int(self.max_length)  # type: ignore[attr-defined]
        if not 0 < most < limit:
            raise UserError(
                f"max_gen_toks={most}: expected at least 1 and less than the model's max_length={limit}; lower it with "
                "--gen_kwargs max_gen_toks=…, or raise max_length if the model can take it"
            )
        return most

    def bos_rule(self) -> dict[str, Any] | None:
        """What `tok_encode` does to a text.

        before_text: ids that it puts before a text which does not begin with the prefix token's own text (before one
        that does, it puts nothing). prefix_token_id: what stands for an empty context, and before a text whose whole
        log-likelihood is taken. add_bos_token: what was asked for; None: as the tokenizer does by itself.
        """
        try:
            plain, whole = (list(self.tok_encode("a", add_special_tokens=s)) for s in (False, None))  # type: ignore[attr-defined]
            at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
            return {
                "before_text": whole[:at],
                "prefix_token_id": int(self.prefix_token_id),  # type: ignore[attr-defined]
                "add_bos_token": getattr(self, "add_bos_token", None),
            }
        except Exception as error:  # the scores are there by now
            logger.warning("what the tokenizer puts before a text is unknown: %s", first_line(error))
            return None

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """The harness class' answers; those that are NaN are counted, for the result to say so."""
        answers = super().loglikelihood(requests, *args, **kwargs)  # type: ignore[misc]
        self._count_nan([total for total, _ in answers])
        return answers

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """As `loglikelihood`."""
        answers = super().loglikelihood_rolling(requests, *args, **kwargs)  # type: ignore[misc]
        self._count_nan(answers)
        return answers

    def _count_nan(self, totals: Sequence[float]) -> None:
        self._answers += len(totals)
        bad = sum(1 for total in totals if total != total)
        self._nan_answers += bad
        if bad:
            logger.error(
                "%d of %d log-likelihoods are NaN: the figures made of them mean nothing (damaged weights, or a dtype "
                "that overflows); the result says so, and compare shows them as unknown",
                bad,
                len(totals),
            )

    @property
    def window_limit(self) -> int:
        """The most tokens that a window may have."""
        return int(self.max_length)  # type: ignore[attr-defined]

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary: token ids are below it, and the softmax runs over it."""
        raise NotImplementedError

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into `config` of the result file; ours is under `quantization`."""
        inherited: dict[str, Any] = getattr(super(), "get_model_info", dict)()
        try:
            facts = self.describe()
        except Exception as error:  # the scores are there by now, and must not be lost
            logger.exception("the model's description failed; its figures are null")
            name = type(self).__name__
            facts = Quantization(self.label or name, name, None, notes=[f"unknown: {first_line(error)}"])
        facts.bos = self.bos_rule()
        if self._nan_answers:
            facts.nan_loglikelihoods = self._nan_answers
            facts.notes.append(
                f"{self._nan_answers} of {self._answers} log-likelihoods are NaN: figures made of them mean nothing"
            )
        if self._window_seconds:
            facts.tokens_per_second = self._window_tokens / self._window_seconds
        return {**inherited, "quantization": asdict(facts)}


def check_windows(windows: Sequence[WindowRequest], limit: int, vocabulary: int) -> None:
    """Raises UserError where a window is longer than the model's context or holds an id beyond its vocabulary."""
    check_length(windows, limit)
    largest = max(max(w.ids) for w in windows)
    if largest >= vocabulary:
        raise UserError(
            f"token id {largest} is beyond this model's vocabulary of {vocabulary}: the text was tokenized for another "
            "model; set tokenizer= to this model's own"
        )


def from_storage(
    path: str | None, cache_types: tuple[str | int | None, str | int | None] = (None, None), **facts: Any
) -> Quantization:
    """A Quantization with the figures that the checkpoint's headers give; nulls and the reason where they do not.

    cache_types: of keys and values in the engine's KV cache, as for `kv_cache`; None: the checkpoint's own.
    """
    if path is None:
        return Quantization(**facts, notes=["bits per weight unknown: the checkpoint is not a local file or folder"])
    cache = kv_cache(path, *cache_types)
    facts |= {"kv_bytes_per_token": cache.bytes_per_token, "kv_cache_dtype": cache.dtype}
    try:
        info: StorageInfo = inspect(path)
    except (StorageError, OSError) as error:
        logger.warning("bits per weight unknown: %s", error)
        return Quantization(**facts, notes=[f"bits per weight unknown: {error}", *filter(None, [cache.note])])
    return Quantization(
        **facts,
        family=info.family,
        scheme=info.scheme,
        layer_bpw=info.layer_bpw,
        head_bpw=info.head_bpw,
        vram_gb=info.vram_gb,
        file_bpw=info.file_bpw,
        weight_bytes=info.weight_bytes,
        layer_parameters=info.layer_elements or None,
        notes=[*info.notes, *filter(None, [cache.note])],
    )


def quantized_at_load(facts: Quantization, method: str) -> Quantization:
    """The description of a checkpoint that the engine quantized while loading: its headers say nothing of that."""
    facts.family = facts.scheme = method
    facts.layer_bpw = facts.head_bpw = facts.vram_gb = facts.file_bpw = facts.weight_bytes = None
    facts.notes.append(f"bits per weight unknown: quantized at load ({method}), not in the checkpoint")
    return facts


def explain_load(error: Exception, pretrained: Any, hint: str = "") -> UserError:
    """A loading error as one line, with what the checkpoint's headers show to be wrong, if they do.

    The engine's own traceback is chained to it: LMEVAL_EXT_TRACEBACK=1 shows both.
    """
    if isinstance(error, UserError):
        return error
    path = local_checkpoint(pretrained)
    if path is not None:
        try:
            inspect(path)
        except StorageError as reason:
            return UserError(str(reason))
        except OSError:
            pass
    what = f"{pretrained!r}" if isinstance(pretrained, str) else type(pretrained).__name__
    hint = hint or "LMEVAL_EXT_TRACEBACK=1 shows where"
    return UserError(f"pretrained={what} could not be loaded ({type(error).__name__}: {first_line(error)}); {hint}")


def local_checkpoint(pretrained: Any, revision: str | None = None) -> str | None:
    """The file or folder behind `pretrained`: itself, or the hub's snapshot in the local cache. None if neither."""
    if not isinstance(pretrained, str):
        return None
    if Path(pretrained).exists():
        return pretrained
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(pretrained, revision=revision, local_files_only=True))
    except Exception:
        return None


def default_label(pretrained: Any) -> str:
    """The checkpoint's own name, where no `label=` is given."""
    return Path(pretrained).resolve().name if isinstance(pretrained, str) else type(pretrained).__name__


def first_line(error: BaseException) -> str:
    """An engine's error as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def logprobs_of_targets(logits: Any, targets: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """`target_logprobs`, fetched: (logprobs float32, greedy bool), both [positions]."""
    from lmeval_ext.models.target_logprobs import target_logprobs

    logprobs, greedy = target_logprobs(logits, targets.to(logits.device), vocabulary)
    return logprobs.cpu().numpy(), greedy.cpu().numpy()
