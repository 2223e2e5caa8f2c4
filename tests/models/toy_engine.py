"""A test engine in one file: everything that the contract requires, on a table of bigram logits.

lmeval_ext/models/README.md describes the steps. test_toy_engine.py registers it by one entry-point line:

    [lm_eval.models]
    toy = tests.models.toy_engine:Toy
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lmeval_ext.errors import UserError
from lmeval_ext.models.loading import default_label
from lmeval_ext.models.observed import Observed
from lmeval_ext.models.record import Quantization, from_storage
from lmeval_ext.models.token_lm import TokenLM
from lmeval_ext.requests import WindowRequest, WindowScores


class Toy(Observed, TokenLM):
    """Scores tokens by a table: the logits of the next token are bigrams[last token].

    pretrained: a folder with model.safetensors and a tokenizer.
    """

    engine_packages = ("safetensors",)
    context_argument = "max_length"

    def __init__(
        self,
        pretrained: str,
        label: str | None = None,
        max_length: int = 256,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.take_reference_arguments(arguments)
        if arguments:
            raise UserError(f"toy: unknown arguments {', '.join(arguments)}")
        self.label = label or default_label(pretrained)
        self.folder, self._max_length = pretrained, max_length
        self.bigrams = load_file(Path(pretrained, "model.safetensors"))["bigrams"]
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def vocabulary(self) -> int:
        return len(self.bigrams)

    def checkpoint(self) -> str | None:
        return self.folder

    def describe(self) -> Quantization:
        return from_storage(
            self.folder, label=self.label, engine="toy", engine_version="1.0", dtype="float32", device="cpu"
        )

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        scores = []
        with self.progress(len(windows)) as done:
            for window in windows:
                targets = torch.tensor(window.target_ids)
                before = torch.tensor(window.ids[-len(targets) - 1 : -1])
                scores.append(self.scores_of(window, self.bigrams[before], targets))
                done(1)
        return scores
