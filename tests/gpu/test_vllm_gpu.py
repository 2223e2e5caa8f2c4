"""vLLM on a GPU: needs one, so it is deselected elsewhere. Run by hand: pytest -m gpu tests/gpu

SMOLLM2_DIR names a folder with SmolLM2-135M-NVFP4A16 and SmolLM2-135M-NVFP4 (demo/quantize_ct.py), WIKITEXT2_DIR
the data set's test split.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["NVFP4A16", "NVFP4"])
def result(request: Any) -> tuple[str, Any]:
    from lmeval_ext import _hook
    from tests.conftest import evaluate

    _hook.install()  # a GPU host may have no installed package
    folder = Path(os.environ["SMOLLM2_DIR"]) / f"SmolLM2-135M-{request.param}"
    text = {"text_path": str(Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw")}
    return request.param, evaluate(
        "vllm_nvfp4", "wiki2_strided", limit=2, metadata=text, pretrained=str(folder), gpu_memory_utilization=0.3
    )


def test_perplexity_is_that_of_the_weights(result: tuple[str, Any]) -> None:
    """On Hopper both run weight-only on Marlin; Transformers gives 25.1708 for A16."""
    perplexity = result[1]["results"]["wiki2_strided"]["token_perplexity,none"]
    assert perplexity == pytest.approx(25.1708, rel=1e-2)


def test_kernel_and_memory_are_reported(result: tuple[str, Any]) -> None:
    scheme, evaluated = result
    facts = evaluated["config"]["quantization"]
    assert facts["kernel"] == "MarlinNvFp4LinearKernel"
    assert 0.05 < facts["peak_vram_gb"] < 20
    assert facts["kv_pool_gb"] > 1
    assert any("weight-only" in note for note in facts["notes"]) == (scheme == "NVFP4")
