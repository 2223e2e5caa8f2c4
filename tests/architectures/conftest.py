"""Each tiny checkpoint is made once per session, and loaded into `hf_quant`, which writes a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.requests import WindowRequest, WindowScores, window_request
from tests.architectures.checkpoints import ARCHITECTURES, make_checkpoint, windows


def requests() -> list[WindowRequest]:
    return [window_request(str(i), ids, 1, {}, ("text", i, 1)) for i, ids in enumerate(windows())]


@dataclass
class Checkpoint:
    """folder: of the checkpoint. plain: log-probabilities of a plain forward; expected: those of `requests()`.

    model: in `hf_quant`. store: the reference that it wrote, with `scores`.
    """

    name: str
    folder: Path
    plain: Callable[[Sequence[int]], Any]
    expected: list[np.ndarray]
    model: Any
    store: str
    scores: list[WindowScores]

    def measure(self, store: str) -> list[WindowScores]:
        """Scores of `hf_quant`, measured against a reference of another engine."""
        return measure(self.model, store)


def measure(model: Any, store: str) -> list[WindowScores]:
    """Scores of a model, measured against a reference."""
    model.reference_arguments = ReferenceArguments(reference=store)
    try:
        return list(model.score_checked(requests()))
    finally:
        model.reference_arguments = ReferenceArguments()


def assert_equal_logprobs(scores: list[WindowScores], expected: Sequence[np.ndarray], tolerance: float = 1e-4) -> None:
    for found, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(found.logprobs, wanted, rtol=0, atol=tolerance)


def assert_no_divergence(scores: list[WindowScores], expected: Sequence[np.ndarray]) -> None:
    """The reference's log-probabilities are the expected ones, and no distribution differs from it."""
    for found, wanted in zip(scores, expected, strict=True):
        divergence = found.divergence or {}
        np.testing.assert_allclose(divergence["reference_logprobs"], wanted, rtol=0, atol=1e-4)
        assert np.abs(divergence["kld"]).max() < 1e-6


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    from lm_eval.api.registry import get_model

    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            plain = make_checkpoint(name, root / "model")
            model = get_model("hf_quant")(
                pretrained=str(root / "model"),
                dtype="float32",
                device="cpu",
                batch_size=2,
                multimodal=ARCHITECTURES[name].multimodal,
                save_reference=str(root / "store"),
            )
            scores = model.score_checked(requests())
            expected = [plain(ids) for ids in windows()]
            made[name] = Checkpoint(name, root / "model", plain, expected, model, str(root / "store"), scores)
        return made[name]

    return make
