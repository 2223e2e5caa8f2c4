"""What Transformers leaves out of a checkpoint is in the result: activations that are not quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file

from compare.results.arithmetic import WEIGHT_ONLY, arithmetic_run, scheme_arithmetic
from tests.conftest import make_llama
from tests.models.hf.test_damaged_checkpoints import scores
from tests.models.hf.tiny_checkpoints import MAKERS, dense, fp8_block, missing_packages, write

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("activations") / "dense")


def description(folder: Path) -> Any:
    return get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu").get_model_info()["quantization"]


@pytest.mark.parametrize(
    ("name", "family", "bits", "kernel", "marked"),
    [
        ("dense", "full precision", 32, None, False),
        ("fp8-block", "FP8", 8 + 32 / 32**2, "decoded", True),
        ("mxfp8", "FP8", 8 + 8 / 32, "decoded", True),
        ("ct-fp8", "FP8", None, "compressed-tensors", False),
        ("ct-nvfp4", "NVFP4", None, "compressed-tensors", False),
        ("gptq", "GPTQ", None, "gptq (TorchLinear)", False),
        ("awq", "AWQ", 4 + (16 + 4) / 32, "awq (AwqTorchLinear)", False),
        ("bnb-nf4", "bitsandbytes", None, "bitsandbytes", False),
    ],
)  # fmt: skip
def test_description_has_figures_and_marks_unquantized_activations(
    name: str, family: str, bits: float | None, kernel: str | None, marked: bool, source: Path, tmp_path: Path
) -> None:
    if missing := missing_packages(name):
        pytest.skip(f"{', '.join(missing)}: not installed")
    found = description(MAKERS[name][0](source, tmp_path / name))
    assert (found["family"], found["kernel"]) == (family, kernel)
    assert found["layer_bpw"] == pytest.approx(bits) if bits else found["layer_bpw"] < 9
    assert found["head_bpw"] == 32
    asked, ran = scheme_arithmetic(found["scheme"]), arithmetic_run(found["scheme"], kernel, tuple(found["notes"]))
    assert (asked != ran, ran == WEIGHT_ONLY) == (marked, marked or asked == WEIGHT_ONLY)


def test_fp8_blocks_that_do_not_divide_a_matrix_are_decoded_rightly(source: Path, tmp_path: Path) -> None:
    """128 rows in blocks of 96: Transformers would give each block 64 rows."""
    folder = fp8_block(source, tmp_path / "uneven", block=96)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = tensors[name.removesuffix("_scale_inv")].float(), tensors.pop(name)
        rows, columns = (torch.arange(size) // 96 for size in weight.shape)
        tensors[name.removesuffix("_scale_inv")] = weight * scale[rows][:, columns]
    twin = write(dense(source, tmp_path / "dense"), tmp_path / "twin", tensors, None)
    np.testing.assert_allclose(scores(folder), scores(twin), rtol=1e-5, atol=1e-5)
