"""References: what an adapter adds so that its distributions can be stored, or measured against stored ones.

An engine in this process passes its logits to `scores_of` (or `observe`) while it scores windows. An engine whose
logits stay in other processes overrides `observe_windows`, `take_states`, `write_head` and `stop_observing`.
`lmeval_ext.divergence` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.errors import MissingEngineError, first_line
from lmeval_ext.models.adapter import Adapter
from lmeval_ext.requests import WindowRequest, WindowScores, key_of

if TYPE_CHECKING:
    import torch

    from lmeval_ext.divergence.head import OutputHead
    from lmeval_ext.divergence.observer import Observer
    from lmeval_ext.divergence.plan import ObservationPlan
    from lmeval_ext.divergence.store import ReferenceStore


class WindowParts:
    """Scores of one window whose logits come part by part; a model's observer sees each part."""

    def __init__(self, model: Observed, window: WindowRequest) -> None:
        self._model, self._window, self._done = model, window, 0
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, logits: Any, targets: Any, hidden: Any = None) -> None:
        """Takes the logits of the next targets; tensors as for `Observed.scores_of`. They are not kept."""
        from lmeval_ext.models.target_logprobs import logprobs_of_targets

        logprobs, greedy = logprobs_of_targets(logits, targets, self._model.vocabulary)
        divergence = self._model.observe(self._window, hidden, logits, targets, self._done) or {}
        self._done += len(logprobs)
        for name, column in ({"logprobs": logprobs, "greedy": greedy} | divergence).items():
            self._columns.setdefault(name, []).append(column)

    def scores(self) -> WindowScores:
        """The scores of all parts."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        logprobs, greedy = columns.pop("logprobs"), columns.pop("greedy")
        return WindowScores.of(logprobs, greedy, columns or None)


class Observed(Adapter):
    """An adapter that takes `reference=` and `save_reference=`; it satisfies `divergence.MeasuredModel`.

    The constructor calls `take_reference_arguments` with its keyword arguments.
    """

    # Facts for `compare run`, which reads them in the source of the class that an entry point names, without importing
    # it: they stand there as literals. A class with `engine_packages` is taken to accept label= and reference=.
    engine_packages: tuple[str, ...]  # distributions of the engine; the first one installed enters a result's key
    stock_models: tuple[str, ...] = ()  # models of the harness that this one can replace
    context_argument: str | None = None  # the argument that sizes the context, if it has to be given
    needs_tokenizer: bool = False  # whether it needs the data spec's tokenizer as its own tokenizer= argument
    # Modules that are imported only when a model is loaded or a task is made; `compare run` imports them once for all
    # processes that it forks. None may start a thread or initialize a GPU. May be computed.
    late_imports: tuple[str, ...] = ("lmeval_ext.tasks.perplexity",)

    # Arguments of this engine that do not change its distributions: places, sizes of batches and of memory. All other
    # arguments are part of a reference's identity. tests/models/test_neutral_arguments.py lists both kinds.
    neutral_arguments: frozenset[str] = frozenset()
    # What the engine passes to `observe`: "hidden", its final hidden states, which are small and exact, if there is an
    # `output_head`; "logits" alone otherwise. The first one is the default of save_reference=.
    reference_modes: tuple[str, ...] = ("logits",)
    reference_arguments = ReferenceArguments()
    observer: Observer | None = None  # reads the logits of windows while they are scored
    _observed_head: OutputHead | None = None

    def take_reference_arguments(self, arguments: dict[str, Any]) -> None:
        """Moves reference=, save_reference=, … from `arguments` to this model. Raises UserError for invalid ones."""
        self.reference_arguments = ReferenceArguments.take(arguments, self.neutral_arguments)

    def score_checked(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Scores windows; with a reference, each `WindowScores` holds its divergence."""
        if not self.reference_arguments.active:
            return self.score_timed(windows)
        try:
            from lmeval_ext.divergence import session
        except ImportError as error:
            raise MissingEngineError(
                f"reference= and save_reference= need torch and safetensors ({first_line(error)}): pip install "
                "'lmeval-ext[quant]'"
            ) from error
        return session.score(self, windows)

    def scores_of(self, window: WindowRequest, logits: Any, targets: Any, hidden: Any = None) -> WindowScores:
        """Scores of one window from its logits, which the observer sees too.

        logits: [targets, ≥ vocabulary], row i predicting target i. targets: int64 [targets]. hidden: [targets, width]
        final hidden states, or None. All are torch tensors.
        """
        from lmeval_ext.models.target_logprobs import logprobs_of_targets

        logprobs, greedy = logprobs_of_targets(logits, targets, self.vocabulary)
        return WindowScores.of(logprobs, greedy, self.observe(window, hidden, logits, targets))

    def observe(
        self, window: WindowRequest, hidden: Any, logits: Any, targets: Any, start: int = 0
    ) -> dict[str, Any] | None:
        """Passes scored tokens of one window to the observer, if there is one; tensors as for `scores_of`.

        start: how many scored tokens of the window come before them. Returns `WindowScores.divergence` of these
        tokens, None without an observer.
        """
        if self.observer is None:
            return None
        from lmeval_ext.divergence.measure import fetched
        from lmeval_ext.divergence.observer import WindowSpan

        span = WindowSpan(key_of(window), start, len(targets))
        return fetched(self.observer.observe([span], hidden, logits, targets.to(logits.device)))

    # ------------------------------------------------------------------ what an engine may override

    def scoring_order(self, windows: Sequence[WindowRequest]) -> list[int]:
        """Indices of windows in the order in which `score_windows` scores them; a reference is read ahead in it."""
        return list(range(len(windows)))

    @property
    def windows_at_once(self) -> int:
        """Windows per call of `score_windows` while a reference is written; several keep a GPU busy."""
        return 1

    @property
    def tokenizer_may_differ(self) -> bool:
        """Whether the engine's own tokenizer may split some texts differently from the original's."""
        return False

    @property
    def logits_device(self) -> torch.device | None:
        """Device of the logits, if known before scoring: the reference is copied there meanwhile."""
        return None

    def output_head(self) -> OutputHead:
        """The model's output matrix and what follows it, for mode "hidden". Raises UserError if it is not dense."""
        raise NotImplementedError(f"{type(self).__name__}: reference_modes has 'hidden', but there is no output_head")

    # ------------------------------------------------------------------ the life of an observer

    def observe_windows(self, plan: ObservationPlan) -> dict[str, Any]:
        """Observes the windows that are scored from now on. Returns `head_facts` if the plan needs them, else {}."""
        from lmeval_ext.divergence.plan import cut_head, head_facts

        head = cut_head(self.output_head(), self.vocabulary) if plan.needs_head else None
        self._observed_head, self.observer = head, plan.observer(head, self.logits_device)
        return {} if head is None else head_facts(head)

    def write_head(self, store: ReferenceStore) -> None:
        """Writes the output matrix of the observed windows into the store."""
        assert self._observed_head is not None
        store.write_head(self._observed_head)

    def take_states(self, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Tensors that were kept from each window while a plan saves them. tokens: scored tokens per window key."""
        from lmeval_ext.divergence.observer import Saving

        assert isinstance(self.observer, Saving)
        return {key: self.observer.take(key, count) for key, count in tokens.items()}

    def stop_observing(self) -> None:
        """Releases the observer. Idempotent."""
        if self.observer is not None:
            self.observer.close()
        self.observer = self._observed_head = None
