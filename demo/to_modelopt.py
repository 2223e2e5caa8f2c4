"""Writes a compressed-tensors NVFP4 checkpoint in ModelOpt's layout: the same codes and scales under other names.

    python demo/to_modelopt.py NVFP4_DIR OUT_DIR

compressed-tensors stores the reciprocal of a global scale (448 · 6 / absmax), ModelOpt the scale itself (absmax /
2688; TensorRT-Model-Optimizer, modelopt/torch/export/quant_utils.py), so both have the same perplexity.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from outputs import UsageError, checkpoint, new_folder, run
from safetensors.torch import load_file, save_file

NAMES = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}
INDEX = "model.safetensors.index.json"
RECIPROCAL = {"weight_global_scale", "input_global_scale"}


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames quantized tensors as ModelOpt does; other tensors keep their names."""
    quantized = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    if not all(f"{module}.input_global_scale" in tensors for module in quantized):
        raise UsageError(
            "the checkpoint has no input scales (NVFP4A16?): ModelOpt's layout is for W4A4; quantize with NVFP4"
        )
    converted = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in quantized:
            name, tensor = (
                f"{module}.{NAMES.get(part, part)}",
                1 / tensor.float().squeeze() if part in RECIPROCAL else tensor,
            )
        converted[name] = tensor.contiguous()
    return converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=checkpoint)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if (options.model / INDEX).exists():
        raise UsageError(f"{options.model} is sharded, which this script does not support")
    with new_folder(options.out) as out:
        for file in options.model.iterdir():
            if file.suffix == ".safetensors":
                save_file(convert(load_file(file)), out / file.name, metadata={"format": "pt"})
            elif file.is_file():
                shutil.copy(file, out)
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": config["quantization_config"].get("ignore", []),
            "producer": {"name": "modelopt"},
        }
        (out / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    run(main)
