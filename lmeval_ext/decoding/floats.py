"""Decodes weights of small floats with scales to dense ones: FP8, MXFP8, NVFP4, MXFP4.

FP8 is stored as one float8 per weight, [out, in]; the weight is the code times its scale. The scale is one number for
the matrix, one per output ([out] or [out, 1]), one per block (`weight_block_size` of the config, 128 × 128 where
ModelOpt's FP8_PB_WO names none, [⌈out / rows⌉, ⌈in / columns⌉] or with a 1 behind each), or one exponent byte per 32
inputs (MXFP8: 2^(byte − 127), [out, in / 32]). It is called `weight_scale` by AutoFP8, vLLM, ModelOpt and
compressed-tensors, and `weight_scale_inv` by DeepSeek and Transformers; either way the code is multiplied by it.

FP4 (E2M1: ±0, 0.5, 1, 1.5, 2, 3, 4, 6) is stored as two codes per byte, the first in the low half, [out, in / 2].
NVFP4 has one float8 scale per 16 inputs and one number per matrix: ModelOpt multiplies, `weight_scale` ×
`weight_scale_2` (modelopt/torch/quantization/qtensor/nvfp4_tensor.py); compressed-tensors, where the codes are called
`weight_packed`, divides, `weight_scale` / `weight_global_scale` (quantization/lifecycle/forward.py). MXFP4 has one
exponent byte per 32 inputs.

ModelOpt's `pre_quant_scale` [in] multiplies the activations before the matrix, so it multiplies the weight's inputs.
"""

from __future__ import annotations

import torch

from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_GROUP, NV_GROUP = 32, 16


def fp8(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One FP8 or MXFP8 matrix, dtype [out, in], computed in float32. Raises ValueError if the scales do not fit."""
    codes = parts[".weight"]
    name = next(suffix for suffix in (".weight_scale", ".weight_scale_inv") if suffix in parts)
    expect(codes.dim() == 2, f"weight has the shape {list(codes.shape)}, expected a matrix")
    scale = _scale_per_weight(parts[name], codes.shape[0], codes.shape[1], matrix, name[1:])
    return _with_pre_scale(codes.float() * scale, parts).to(dtype)


def nvfp4(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One NVFP4 matrix, dtype [out, in], computed in float32. Raises ValueError for other shapes."""
    name = ".weight_global_scale" if ".weight_global_scale" in parts else ".weight_scale_2"
    expect(parts[name].numel() == 1, f"{name[1:]} is not one number")
    number = parts[name].float().reshape(())
    values = _grouped(parts, NV_GROUP)
    scale = parts[".weight_scale"].float()
    scale = scale / number if name == ".weight_global_scale" else scale * number
    return _with_pre_scale(values * scale.repeat_interleave(NV_GROUP, 1), parts).to(dtype)


def mxfp4(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One MXFP4 matrix, dtype [out, in]: exact in float32. Raises ValueError for other shapes."""
    values = _grouped(parts, MX_GROUP)
    scale = exponents(parts[".weight_scale"]).repeat_interleave(MX_GROUP, 1)
    return _with_pre_scale(values * scale, parts).to(dtype)


def _grouped(parts: Parts, group: int) -> torch.Tensor:
    """The values of packed FP4 codes, float32 [out, in]. Raises ValueError unless each group of inputs has a scale."""
    values = _e2m1(parts[".weight_packed" if ".weight_packed" in parts else ".weight"])
    expect(values.shape[1] % group == 0, f"{values.shape[1]} inputs are not groups of {group}")
    expect_shape(parts, ".weight_scale", len(values), values.shape[1] // group)
    return values


def exponents(bytes_: torch.Tensor) -> torch.Tensor:
    """2^(byte − 127) of E8M0 bytes, float32. Raises ValueError for the byte 255, which stands for NaN."""
    raw = bytes_.view(torch.uint8).int()
    expect(not bool((raw == 255).any()), "a scale is NaN (E8M0 byte 255)")
    return torch.ldexp(torch.ones(raw.shape, device=raw.device), raw - 127)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The values of packed FP4 codes: float32 [out, 2 · bytes]."""
    expect(packed.dim() == 2, f"weight has the shape {list(packed.shape)}, expected a matrix")
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    return table[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]


def _scale_per_weight(scale: torch.Tensor, rows: int, columns: int, matrix: Matrix, name: str) -> torch.Tensor:
    """The scale as a tensor that broadcasts to [rows, columns], float32."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        expect(
            tuple(scale.shape) == (rows, columns // MX_GROUP) and columns % MX_GROUP == 0,
            f"{name} has the shape {list(scale.shape)}, expected one exponent per {MX_GROUP} of {rows} x {columns}",
        )
        return exponents(scale).repeat_interleave(MX_GROUP, 1)
    if scale.numel() == 1:
        return scale.float().reshape(1, 1)
    if tuple(scale.shape) in ((rows,), (rows, 1)):
        return scale.float().reshape(rows, 1)
    what = ""
    if block := block_size(matrix):
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        if tuple(scale.shape) in (blocks, (blocks[0], 1, blocks[1], 1)):
            wide = scale.float().reshape(blocks).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            return wide[:rows, :columns]
        what = f", or {list(blocks)} for blocks of {block[0]} x {block[1]}"
    raise ValueError(
        f"{name} has the shape {list(scale.shape)}, expected one number, or one per output of {rows}{what}"
    )


def block_size(matrix: Matrix) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the quantization config; None if it names no blocks."""
    config = matrix.quantization
    inner = config.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else config).get("quant_algo")
    size = config.get("weight_block_size") or ([128, 128] if algorithm == "FP8_PB_WO" else None)
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


def _with_pre_scale(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    if ".pre_quant_scale" not in parts:
        return weight
    scale = parts[".pre_quant_scale"].float()
    expect(tuple(scale.shape) == (weight.shape[1],), f"pre_quant_scale has the shape {list(scale.shape)}")
    return weight * scale
