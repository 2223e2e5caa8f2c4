"""Decodes AQLM to dense weights in plain PyTorch: any device, no kernels.

The format (arXiv:2401.06118; aqlm 1.1.7, aqlm/utils.py `_dequantize_weight`): a matrix is cut into blocks of h outputs
× g inputs, and each block is a sum of C vectors, one from each codebook, times the scale of its block row.

- `codes` [out / h, in / g, C]: int8, int16 or int32; the code is the stored number modulo 2^b.
- `codebooks` [C, 2^b, h, g], floats. `scales` [out / h, 1, 1, 1], floats.
- block(O, I) = scales[O] · Σ_c codebooks[c][code[O, I, c]].

Sum and product are taken in float32, the sum first.
"""

from __future__ import annotations

import torch

from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape

CODE_BITS = {torch.int8: 8, torch.int16: 16, torch.int32: 32}


def decode(parts: Parts, dtype: torch.dtype, matrix: Matrix, elements: int = 1 << 22) -> torch.Tensor:
    """One matrix, dtype [out, in]. At most about `elements` weights are processed at a time.

    Raises ValueError if the tensors do not fit together, or differ from the config.
    """
    codes, codebooks = parts[".codes"], parts[".codebooks"]
    expect(codes.dim() == 3, f"codes has the shape {list(codes.shape)}, expected [out / h, in / g, codebooks]")
    expect(codebooks.dim() == 4, f"codebooks has the shape {list(codebooks.shape)}, expected [codebooks, 2^b, h, g]")
    rows, columns, count = codes.shape
    size, height, width = codebooks.shape[1:]
    expect(len(codebooks) == count, f"codes of {count} codebooks, but codebooks has {len(codebooks)}")
    bits = size.bit_length() - 1
    expect(size == 1 << bits, f"codebooks of {size} vectors, expected a power of two")
    stored = CODE_BITS[codes.dtype]
    smallest = min(b for b in CODE_BITS.values() if b >= bits)
    expect(stored == smallest, f"codes of {bits} bits are stored in {stored}, expected {smallest}")
    expect_shape(parts, ".scales", rows, 1, 1, 1)
    _expect_config(matrix, nbits_per_codebook=bits, num_codebooks=count, out_group_size=height, in_group_size=width)
    table, scales = codebooks.float(), parts[".scales"].float().reshape(rows, 1, 1, 1)
    out = torch.empty((rows * height, columns * width), dtype=dtype, device=codes.device)
    step = max(1, elements // (columns * width * height))
    for start in range(0, rows, step):
        index = codes[start : start + step].long() & (size - 1)
        blocks = table[0][index[:, :, 0]]
        for book in range(1, count):
            blocks = blocks + table[book][index[:, :, book]]
        blocks = blocks * scales[start : start + step]  # [rows, columns, h, g]
        dense = blocks.transpose(1, 2).reshape(-1, columns * width)
        out[start * height : start * height + len(dense)] = dense.to(dtype)
    return out


def _expect_config(matrix: Matrix, **measured: int) -> None:
    for name, value in measured.items():
        said = matrix.quantization.get(name, value)
        expect(said == value, f"its tensors have {name} {value}, but config.json says {said}")
