"""References: what an adapter adds so that its distributions can be stored, or measured against stored ones.

An engine in this process shows its logits to `observe` while it scores windows. An engine in other processes overrides
`observe_windows`, `take_states`, `write_head` and `stop_observing`. `lmeval_ext.divergence` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


class Observed(Adapter):
    """An adapter that takes `reference=` and `save_reference=`; it satisfies `divergence.MeasuredModel`.

    The constructor calls `take_reference_arguments` with its keyword arguments.
    """

    # Arguments of this engine that do not change its distributions: places, sizes of batches and of memory. All other
    # arguments are part of a reference's identity.
    neutral_arguments: frozenset[str] = frozenset()
    # What the engine can show of a window: its final hidden states, which are small and exact, or its logits alone
    reference_modes: tuple[str, ...] = ("hidden", "logits")
    reference_arguments = ReferenceArguments()
    observer: Observer | None = None  # reads the logits of windows while they are scored
    _observed_head: OutputHead | None = None

    def take_reference_arguments(self, arguments: dict[str, Any]) -> None:
        """Removes reference=, save_reference=, … from `arguments` and keeps them. Raises UserError for bad ones."""
        self.reference_arguments = ReferenceArguments.take(arguments, self.neutral_arguments)

    def score_checked(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Scores windows; with a reference, each `WindowScores` has its divergence."""
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

    def observe(self, window: WindowRequest, hidden: Any, logits: Any, targets: Any) -> dict[str, Any] | None:
        """Shows all scored tokens of one window to the observer; returns `WindowScores.divergence`, None without one.

        hidden: [targets, width] final hidden states, or None. logits: [targets, ≥ vocabulary]. targets: int64
        [targets]. All are torch tensors.
        """
        if self.observer is None:
            return None
        from lmeval_ext.divergence.measure import fetched
        from lmeval_ext.divergence.observer import WindowSpan

        span = WindowSpan(key_of(window), 0, len(targets))
        return fetched(self.observer.observe([span], hidden, logits, targets.to(logits.device)))

    # ------------------------------------------------------------------ what an engine may say about itself

    def scoring_order(self, windows: Sequence[WindowRequest]) -> list[int]:
        """Indices in the order in which `score_windows` reaches them; a reference is read ahead in this order."""
        return list(range(len(windows)))

    @property
    def windows_at_once(self) -> int:
        """Windows per call of `score_windows` while a reference is written; more keep a GPU busy."""
        return 1

    @property
    def tokenizer_may_differ(self) -> bool:
        """Whether the engine's own tokenizer may split some texts differently from the original's."""
        return False

    @property
    def logits_device(self) -> torch.device | None:
        """Where logits will be, if known before scoring: the reference is copied there meanwhile."""
        return None

    def output_head(self) -> OutputHead:
        """The model's output matrix and what follows it. Raises UserError if there is none to show."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the life of an observer

    def observe_windows(self, plan: ObservationPlan) -> dict[str, Any]:
        """Observes windows scored from now on. Returns `head_facts` if the plan needs them, else {}."""
        from lmeval_ext.divergence.plan import cut_head, head_facts

        head = cut_head(self.output_head(), self.vocabulary) if plan.needs_head else None
        self._observed_head, self.observer = head, plan.observer(head, self.logits_device)
        return {} if head is None else head_facts(head)

    def write_head(self, store: ReferenceStore) -> None:
        """Writes the output matrix of the observed windows into the store."""
        assert self._observed_head is not None
        store.write_head(self._observed_head)

    def take_states(self, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """Tensors kept from each window while a plan saves them; tokens: scored tokens per window key."""
        from lmeval_ext.divergence.observer import Saving

        assert isinstance(self.observer, Saving)
        return {key: self.observer.take(key, count) for key, count in tokens.items()}

    def stop_observing(self) -> None:
        """Releases the observer. Idempotent."""
        if self.observer is not None:
            self.observer.close()
        self.observer = self._observed_head = None
