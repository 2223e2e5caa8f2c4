"""demo/to_modelopt.py against both layouts' definitions of a global scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import outputs
import pytest
import to_modelopt
import torch
from safetensors.torch import load_file, save_file

from lmeval_ext.storage import inspect

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def nvfp4(tmp_path: Path) -> Path:
    """A checkpoint of one quantized layer with a bias, 64 × 32, and an embedding."""
    folder = tmp_path / "nvfp4"
    folder.mkdir()
    tensors = {
        f"{Q}.weight_packed": torch.randint(0, 256, (64, 16), dtype=torch.uint8),
        f"{Q}.weight_scale": torch.full((64, 2), 2.0).to(torch.float8_e4m3fn),
        f"{Q}.weight_global_scale": torch.tensor([8.0]),
        f"{Q}.input_global_scale": torch.tensor([0.25]),
        f"{Q}.bias": torch.zeros(64, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.zeros(10, 32, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


def convert(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["to_modelopt.py", str(source), str(target)])
    to_modelopt.main()
    return target


def test_global_scales_are_reciprocals(nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors: code × scale / 8; ModelOpt: code × scale × (1/8)."""
    out = convert(nvfp4, tmp_path / "modelopt", monkeypatch)
    before, after = load_file(nvfp4 / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after[f"{Q}.weight"], before[f"{Q}.weight_packed"])
    assert after[f"{Q}.weight_scale_2"].item() == 0.125
    assert after[f"{Q}.input_scale"].item() == 4.0
    assert {f"{Q}.bias", f"{Q}.weight_scale", "model.embed_tokens.weight"} < set(after)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_algo"], config["ignore"]) == ("NVFP4", ["lm_head"])
    assert inspect(out).layer_bpw == inspect(nvfp4).layer_bpw == pytest.approx(4.5 + 64 / (64 * 32))


def test_weight_only_checkpoints_are_refused(nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(nvfp4 / "model.safetensors")
    del tensors[f"{Q}.input_global_scale"]
    save_file(tensors, nvfp4 / "model.safetensors")
    with pytest.raises(outputs.UsageError, match="no input scales"):
        convert(nvfp4, tmp_path / "modelopt", monkeypatch)
