"""What `session` and `fit` need from a model. `lmeval_ext.models.observed.Observed` implements it for every adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.divergence.plan import ObservationPlan
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.requests import WindowRequest, WindowScores


class ModelFacts(Protocol):
    """The facts that determine a model's distributions; fields of `config.quantization` in a result file."""

    label: str
    engine: str
    engine_version: str | None
    dtype: str | None
    device: str | None
    kernel: str | None


class MeasuredModel(Protocol):
    """A model whose distributions are stored as a reference, or measured against one."""

    label: str | None
    bar: Any  # a progress bar over several calls of `score_timed`, or None
    reference_arguments: ReferenceArguments
    reference_modes: tuple[str, ...]

    @property
    def vocabulary(self) -> int: ...
    @property
    def windows_at_once(self) -> int: ...
    @property
    def tokenizer_may_differ(self) -> bool: ...

    def describe(self) -> ModelFacts: ...
    def checkpoint(self) -> str | None: ...
    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]: ...

    def scoring_order(self, windows: Sequence[WindowRequest]) -> list[int]: ...
    def score_timed(self, windows: Sequence[WindowRequest]) -> list[WindowScores]: ...

    def observe_windows(self, plan: ObservationPlan) -> dict[str, Any]: ...
    def write_head(self, store: ReferenceStore) -> None: ...
    def take_states(self, tokens: dict[str, int]) -> dict[str, dict[str, Any]]: ...
    def stop_observing(self) -> None: ...
