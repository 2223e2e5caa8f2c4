"""`hf_quant` reads the checkpoints that the GPU tests give to the engines: the same scores as their decoded twins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.requests import window_request
from tests.architectures.checkpoints import windows
from tests.architectures.mixtures import FAMILIES, make_dense, quantize

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WEIGHT_ONLY = ("NVFP4A16", "MXFP4", "FP8_BLOCK", "EXL3")
CASES = [
    (family, scheme)
    for family, row in FAMILIES.items()
    for scheme in row.formats
    if scheme in WEIGHT_ONLY and family != "gemma3"  # Transformers itself decodes dense NVFP4, and to bfloat16
]


def logprobs(folder: Path) -> np.ndarray:
    model = get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu")
    requests = [window_request(str(i), ids, 1, {}, ("text", i, 1)) for i, ids in enumerate(windows())]
    return np.concatenate([scores.logprobs for scores in model.score_checked(requests)])


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_checkpoint_has_the_scores_of_its_decoded_twin(family: str, scheme: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", family)
    twin = quantize(dense, tmp_path / "quantized", family, scheme)
    expected = logprobs(twin)
    np.testing.assert_allclose(logprobs(tmp_path / "quantized"), expected, atol=2e-4)
    assert np.abs(logprobs(dense) - expected).max() > 0.1
