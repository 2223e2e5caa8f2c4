"""Tiny quantized checkpoints for `hf_quant`, each written from the definition of its format or by its own library."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT

Tensors = dict[str, torch.Tensor]
F8 = torch.float8_e4m3fn


def _matrices(tensors: Tensors) -> list[str]:
    """Base names of the decoder's matrices."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def write(source: Path, folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    """Writes a checkpoint with the source's config and tokenizer, other tensors and another quantization config."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def dense(source: Path, folder: Path) -> Path:
    return write(source, folder, load_file(source / "model.safetensors"), None)


def fp8_block(source: Path, folder: Path, block: int = 32) -> Path:
    """DeepSeek's layout: a scale per square block, the last ones cut off (DeepSeek-V3, inference/kernel.py)."""
    tensors = load_file(source / "model.safetensors")
    for base in _matrices(tensors):
        weight = tensors[f"{base}.weight"].float()
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
        blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(F8)
        tensors[f"{base}.weight"] = codes.flatten(2).flatten(0, 1)[:rows, :columns]
        tensors[f"{base}.weight_scale_inv"] = scale
    return write(source, folder, tensors, {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block],
    })  # fmt: skip


def mxfp8(source: Path, folder: Path) -> Path:
    """A power of two per 32 weights, as its exponent plus 127 in one byte (OCP MX specification 1.0)."""
    tensors = load_file(source / "model.safetensors")
    for base in _matrices(tensors):
        groups = tensors[f"{base}.weight"].float().unflatten(1, (-1, 32))
        exponent = (groups.abs().amax(-1) / 448).log2().ceil()
        tensors[f"{base}.weight"] = (groups / exponent.exp2()[..., None]).to(F8).flatten(1)
        tensors[f"{base}.weight_scale_inv"] = (exponent + 127).to(torch.uint8)
    return write(source, folder, tensors, {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32], "scale_fmt": "ue8m0",
    })  # fmt: skip


def compressed(scheme: str) -> Callable[[Path, Path], Path]:
    """The maker of a compressed-tensors checkpoint, by the demo's own script."""

    def make(source: Path, folder: Path) -> Path:
        sys.path.insert(0, str(ROOT / "demo"))
        try:
            import quantize_ct
        finally:
            sys.path.remove(str(ROOT / "demo"))
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        parsed, observed = quantize_ct.parse_scheme(scheme), {}
        if quantize_ct.needs_calibration(parsed):
            text = ROOT / "lmeval_ext" / "tasks" / "sample.txt"
            observed = quantize_ct.input_ranges(model, AutoTokenizer.from_pretrained(source), text, 512)
        compressor = quantize_ct.quantize(model, parsed, observed)
        model.save_pretrained(folder)
        quantize_ct.copy_settings(source, folder)
        compressor.update_config(str(folder))
        return folder

    return make


def _grouped(weight: torch.Tensor, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zero points [groups, out] and scales [groups, out] of one asymmetric round-to-nearest."""
    groups = weight.float().T.unflatten(0, (-1, group)).numpy()
    low, high = groups.min(1), groups.max(1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    zeros = np.rint(-low / scales).clip(1, 2**bits - 1)
    codes = np.rint(groups / scales[:, None] + zeros[:, None]).clip(0, 2**bits - 1)
    return codes.reshape(-1, weight.shape[0]).astype(np.int64), zeros.astype(np.int64), scales


def _pack(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Packs the last dimension into int32, the first code in the lowest bits; order: of the codes in a word."""
    words = codes.reshape(*codes.shape[:-1], -1, 32 // bits)[..., list(order or range(32 // bits))]
    packed = (words << (bits * np.arange(32 // bits))).sum(-1)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def gptq(source: Path, folder: Path, act_order: bool = True) -> Path:
    """GPTQ's layout, 4 bits, groups of 32, zero points minus 1 (GPTQModel, nn_modules/qlinear/__init__.py)."""
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for base in _matrices(tensors):
        weight = tensors.pop(f"{base}.weight")
        order = rng.permutation(weight.shape[1]) if act_order else np.arange(weight.shape[1])
        codes, zeros, scales = _grouped(weight[:, order], 4, 32)
        groups = np.empty(weight.shape[1], dtype=np.int32)
        groups[order] = np.arange(weight.shape[1]) // 32
        natural = np.empty_like(codes)
        natural[order] = codes
        tensors[f"{base}.qweight"] = _pack(natural.T, 4).T
        tensors[f"{base}.qzeros"] = _pack(zeros - 1, 4)
        tensors[f"{base}.scales"] = torch.from_numpy(scales).half()
        tensors[f"{base}.g_idx"] = torch.from_numpy(groups)
    return write(source, folder, tensors, {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order, "sym": False,
        "checkpoint_format": "gptq",
    })  # fmt: skip


def awq(source: Path, folder: Path) -> Path:
    """AWQ's GEMM layout, 4 bits, groups of 32 (AutoAWQ, awq/modules/linear/gemm.py)."""
    tensors = load_file(source / "model.safetensors")
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    for base in _matrices(tensors):
        codes, zeros, scales = _grouped(tensors.pop(f"{base}.weight"), 4, 32)
        tensors[f"{base}.qweight"] = _pack(codes, 4, interleaved)
        tensors[f"{base}.qzeros"] = _pack(zeros, 4, interleaved)
        tensors[f"{base}.scales"] = torch.from_numpy(scales).half()
    return write(source, folder, tensors, {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    })  # fmt: skip


def bitsandbytes(**settings: Any) -> Callable[[Path, Path], Path]:
    """The maker of a checkpoint that bitsandbytes writes on a CPU."""

    def make(source: Path, folder: Path) -> Path:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(**settings)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu").save_pretrained(
            folder
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
        return folder

    return make


# name: (maker, packages without which Transformers does not run the method)
MAKERS: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "dense": (dense, ()),
    "fp8-block": (fp8_block, ()),
    "mxfp8": (mxfp8, ()),
    "ct-fp8": (compressed("FP8_DYNAMIC"), ("compressed_tensors",)),
    "ct-int8": (compressed("W8A8"), ("compressed_tensors",)),
    "ct-int4": (compressed("W4A16_G32"), ("compressed_tensors",)),
    "ct-nvfp4": (compressed("NVFP4"), ("compressed_tensors",)),
    "gptq": (gptq, ("gptqmodel", "optimum")),
    "awq": (awq, ("gptqmodel",)),
    "bnb-nf4": (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), ("bitsandbytes",)),
    "bnb-nf4-dq": (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), ("bitsandbytes",)
    ),
    "bnb-int8": (bitsandbytes(load_in_8bit=True), ("bitsandbytes",)),
}  # fmt: skip


def missing_packages(name: str) -> list[str]:
    return [package for package in MAKERS[name][1] if importlib.util.find_spec(package) is None]
