"""Checkpoints of a small trained model, made once per session or kept in the folder LMEVAL_EXT_TEST_MODELS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder that holds the checkpoints."""
    kept = os.environ.get("LMEVAL_EXT_TEST_MODELS")
    return Path(kept) if kept else tmp_path_factory.mktemp("checkpoints")


def demo(script: str, *arguments: str | Path) -> None:
    """Runs a script of demo/; fails with the end of its output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo" / script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def smollm2(models: Path) -> Path:
    """SmolLM2-135M-Instruct, decoded to bfloat16 from the GGUF file in its PyPI package."""
    if not (models / "SmolLM2-135M" / "model.safetensors").exists():
        demo("make_model.py", models)
    return models / "SmolLM2-135M"


@pytest.fixture(scope="session")
def quantized(models: Path, smollm2: Path) -> Callable[[str], Path]:
    """Returns a function from a scheme to a compressed-tensors checkpoint of SmolLM2, rounded to nearest."""

    def make(scheme: str) -> Path:
        folder = models / f"SmolLM2-135M-{scheme}"
        if not (folder / "config.json").exists():
            demo("quantize_ct.py", smollm2, folder, "--scheme", scheme)
        return folder

    return make


@pytest.fixture(scope="session")
def q4_gguf(models: Path, bf16_gguf: Path) -> Path:
    """Returns SmolLM2 quantized as Q4_K_M; most tensors are Q5_0, because the width of 576 is not a multiple of 256."""
    file = models / "SmolLM2-135M-Q4_K_M.gguf"
    if not file.exists():
        demo("quantize_gguf.py", bf16_gguf, file, "Q4_K_M")
    return file


@pytest.fixture(scope="session")
def bf16_gguf(models: Path, smollm2: Path) -> Path:
    """Returns SmolLM2 as a GGUF file in bfloat16."""
    file = models / "SmolLM2-135M-BF16.gguf"
    if not file.exists():
        demo("to_gguf.py", smollm2, file, "--type", "BF16")
    return file
