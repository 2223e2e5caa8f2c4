"""What tasks and models exchange: a window to score, and its scores; a prompt to answer in token ids.

A `WindowRequest` is an `Instance` of the harness that is also the triple `(None, context_ids, continuation_ids)`, so
every token-level model of the harness can score it (`models/harness_models.py`). Stock models return `(loglikelihood,
is_greedy)`, ours a `WindowScores`, which begins with the same two. An `AnswerRequest` asks for the token ids that a
model generates, which only our models return.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from lm_eval.api.instance import Instance

from lmeval_ext.errors import UserError

REQUEST_TYPE = "score_token_windows"
ANSWER_TYPE = "generate_token_ids"
_SHORTER_WINDOWS = (
    "eval_len={longest} is beyond this model's context of {limit} tokens{why}; lower it with --metadata "
    "'{{\"eval_len\": {limit}}}', or raise max_length (max_model_len in vLLM, n_ctx in llama.cpp) if the model can "
    "take it"
)


@dataclass
class WindowRequest(Instance):
    """One window: `arguments` = (description, context ids, continuation ids); see the module's docstring."""

    too_long: ClassVar[str] = _SHORTER_WINDOWS  # the message for a window beyond the model's context

    @property
    def context_ids(self) -> list[int]:
        """Tokens that are context only; at least one."""
        return self.arguments[1]

    @property
    def target_ids(self) -> list[int]:
        """Tokens that are scored, each given all before it; at least one."""
        return self.arguments[2]

    @property
    def ids(self) -> list[int]:
        """All tokens of the window."""
        return self.context_ids + self.target_ids

    @property
    def args(self) -> tuple[Any, ...]:
        """The description, for --log_samples: ids would double the file, and their fingerprint is in the result."""
        return (self.arguments[0],)

    def __iter__(self) -> Iterator[Any]:
        return iter((None, self.context_ids, self.target_ids))

    def __getitem__(self, item: int | slice) -> Any:
        return (None, self.context_ids, self.target_ids)[item]

    def __len__(self) -> int:
        return 3


def window_request(
    description: str,
    ids: list[int],
    n_context: int,
    doc: dict[str, Any],
    metadata: Any,
    kind: type[WindowRequest] | None = None,
) -> WindowRequest:
    """A request to score `ids[n_context:]`, each token given all before it. kind: a subclass of WindowRequest."""
    return (kind or WindowRequest)(
        request_type=REQUEST_TYPE,
        doc=doc,
        arguments=(description, ids[:n_context], ids[n_context:]),
        idx=0,
        metadata=metadata,
    )


@dataclass
class AnswerRequest(Instance):
    """One prompt to answer: `arguments` = (description, prompt ids, `AnswerSettings`)."""

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens before the answer; at least one."""
        return self.arguments[1]

    @property
    def settings(self) -> AnswerSettings:
        return self.arguments[2]

    @property
    def args(self) -> tuple[Any, ...]:
        """The description, for --log_samples."""
        return (self.arguments[0],)


class AnswerSettings(NamedTuple):
    """How to answer a prompt.

    max_new: the most tokens to generate. stop: whether the answer ends with the model's own end-of-answer token, which
    is then its last id; without, it has exactly `max_new` tokens. temperature: 0 takes the likeliest token, of which no
    penalty or generation_config.json changes the choice. seed: of the samples at another temperature.
    """

    max_new: int
    stop: bool = True
    temperature: float = 0.0
    seed: int = 0


def answer_request(
    description: str, prompt_ids: list[int], settings: AnswerSettings, doc: dict[str, Any], metadata: Any
) -> AnswerRequest:
    """A request for the token ids of the model's answer to a prompt."""
    return AnswerRequest(
        request_type=ANSWER_TYPE, doc=doc, arguments=(description, prompt_ids, settings), idx=0, metadata=metadata
    )


class WindowScores(NamedTuple):
    """A model's scores of one window, in types that --log_samples can write.

    loglikelihood: float64 sum, natural log. is_greedy: all targets are the model's first choice.
    logprobs: float32 values, one per target. greedy: whether each target is the model's first choice. divergence: from
    a stored reference, None without one: a `TokenColumn` for each of `kld`, `reference_logprobs`, `model_logprobs`,
    `confidence` (float32) and `agree` (bool; `lmeval_ext.divergence.measure.TokenDivergence`), and `reference`, the
    identity of the reference.
    """

    loglikelihood: float
    is_greedy: bool
    logprobs: list[float]
    greedy: list[bool]
    divergence: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, logprobs: npt.ArrayLike, greedy: npt.ArrayLike, divergence: Mapping[str, npt.ArrayLike] | None = None
    ) -> WindowScores:
        """From arrays of one value per target."""
        values = np.asarray(logprobs, dtype=np.float32)
        matches = np.asarray(greedy, dtype=bool)
        if values.shape != matches.shape or values.ndim != 1:
            raise ValueError(f"logprobs {values.shape} and greedy {matches.shape} must be equal and flat")
        total = float(values.sum(dtype=np.float64))
        columns = None if divergence is None else {name: TokenColumn(column) for name, column in divergence.items()}
        return cls(total, bool(matches.all()), _ten_digits(values).tolist(), matches.tolist(), columns)


class TokenColumn:
    """One value per target, float32 or bool; as text, a list.

    Only --log_samples needs the list (the harness writes `str` of a value that is not a list). Making the lists of a
    divergence takes as long as a GPU takes to score the window in a small model.
    """

    def __init__(self, values: npt.ArrayLike) -> None:
        array = np.asarray(values)
        self.values = array.astype(bool if array.dtype == bool else np.float32)  # a copy: views keep whole batches

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False and dtype not in (None, self.values.dtype):
            raise ValueError("another dtype needs a copy")
        return np.array(self.values, dtype=dtype) if copy else np.asarray(self.values, dtype=dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenColumn) and bool(np.array_equal(self.values, other.values, equal_nan=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        plain = self.values.dtype == bool
        return repr((self.values if plain else _ten_digits(self.values)).tolist())


def _ten_digits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Rounds float32 values to ten significant digits: they print half as long, and read back as the same float32.

    An integer below 2^53 over a power of ten is the double nearest to that decimal, which `repr` then prints as such.
    """
    wide = values.astype(np.float64)
    plain = np.isfinite(wide) & (np.abs(wide) > 1e-12) & (np.abs(wide) < 1e9)
    scale = 10.0 ** (9 - np.floor(np.log10(np.abs(wide[plain]))))
    wide[plain] = np.rint(wide[plain] * scale) / scale
    return wide


def check_length(windows: Sequence[WindowRequest], limit: int, why: str = "") -> None:
    """Raises UserError if a window has more than `limit` tokens; `why` explains the limit."""
    longest = max(windows, key=lambda w: len(w.ids))
    if len(longest.ids) > limit:
        raise UserError(longest.too_long.format(longest=len(longest.ids), limit=limit, why=why and f" ({why})"))


def same_shape(windows: Sequence[WindowRequest]) -> list[list[int]]:
    """Groups indices of windows that fit one batch without padding: same length, same scored part."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, w in enumerate(windows):
        groups.setdefault((len(w.context_ids), len(w.target_ids)), []).append(i)
    return list(groups.values())


def window_key(ids: Sequence[int], n_context: int) -> str:
    """Identifies a window by its token ids and the position from which they are scored."""
    return hashlib.sha256(np.array([n_context, *ids], dtype="<i8").tobytes()).hexdigest()[:32]


def key_of(window: WindowRequest) -> str:
    """`window_key` of a task's window, computed once."""
    known: str | None = getattr(window, "_key", None)
    if known is None:
        known = window_key(window.ids, len(window.context_ids))
        setattr(window, "_key", known)  # noqa: B010 (no field of the request)
    return known
