"""The limit of scoring: a worker that runs the output matrix on the scored rows and does nothing with the logits."""

from __future__ import annotations

import torch

from lmeval_ext.models.vllm.scoring import PromptScorer
from lmeval_ext.models.vllm.worker import WorkerExtension


class LimitedWorker(WorkerExtension):
    """Our worker, whose scoring can be reduced to the output matrix."""

    def lmeval_ext_limit(self, on: bool) -> None:
        scorer = self.lmeval_ext_scorer
        if on:

            def logits_alone(hidden_states: torch.Tensor, _targets: torch.Tensor) -> None:
                scorer.compute_logits(hidden_states)

            scorer._score = logits_alone  # type: ignore[method-assign]
        else:
            scorer.__dict__.pop("_score", None)
            PromptScorer.take(scorer)
