"""Decodes HQQ to dense weights in plain PyTorch: any device, no kernels.

The format (hqq 0.2.8, hqq/core/quantize.py and bitpack.py): the matrix, read row by row, is cut into groups of g
weights; the groups are the rows of a matrix of codes [groups, g] (axis 1) or its columns [g, groups] (axis 0).
W = (code − zero) · scale, reshaped to `shape`.

- `W_q` has the codes, several rows of codes in one row of numbers. uint8: 8 bits as they are; 4 bits: the first half
  of the rows in the high four bits, the second half in the low ones; 2 bits: four quarters, highest bits first; 1 bit:
  eight parts. 3 bits: int32, ten parts, bits 27 to 29 first, the rows padded to a multiple of ten.
- `scale`, `zero` floats [groups, 1] or [1, groups]; `shape` int64 [2]; `nbits`, `group_size`, `axis` int32; `packing`
  names the layout as text.
"""

from __future__ import annotations

import torch

from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape

# name of the layout: (bits, dtype, number of parts, bits from one part to the next)
PACKINGS = {
    "8bit_u8": (8, torch.uint8, 1, 8),
    "4bit_u8": (4, torch.uint8, 2, 4),
    "2bit_u8": (2, torch.uint8, 4, 2),
    "1bit_u8": (1, torch.uint8, 8, 1),
    "3bit_32": (3, torch.int32, 10, 3),
}


def decode(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One matrix, dtype [out, in], computed in float32. Raises ValueError if the tensors do not fit together."""
    name = bytes(parts[".packing"].cpu().flatten().tolist()).decode("ascii", "replace")
    expect(name in PACKINGS, f"packing {name[:20]!r} is not known; known are {', '.join(PACKINGS)}")
    bits, kind, count, step = PACKINGS[name]
    expect(parts[".shape"].numel() == 2, f"shape has {parts['.shape'].numel()} numbers, expected 2")
    rows, columns = (int(n) for n in parts[".shape"].flatten().tolist())
    said, axis, size = (int(parts[f".{key}"].item()) for key in ("nbits", "axis", "group_size"))
    expect(said == bits, f"nbits is {said}, but packing {name}")
    expect(axis in (0, 1), f"axis is {axis}, expected 0 or 1")
    expect(rows > 0 and columns > 0 and size > 0 and rows * columns % size == 0, f"groups of {size} do not fit")
    for flag in (".quant_scale", ".quant_zero"):
        nested = flag in parts and bool(parts[flag].item())
        expect(not nested, f"its {flag.removeprefix('.quant_')}s are quantized themselves, which is not decoded here")
    groups = rows * columns // size
    shape = (groups, size) if axis == 1 else (size, groups)
    expect(parts[".W_q"].dtype == kind, f"W_q is {parts['.W_q'].dtype}, expected {kind} for packing {name}")
    packed = -(-shape[0] // count)
    expect(name == "3bit_32" or packed * count == shape[0], f"{shape[0]} rows are not {count} equal parts")
    expect_shape(parts, ".W_q", packed, shape[1])
    for suffix in (".scale", ".zero"):
        expect_shape(parts, suffix, *((groups, 1) if axis == 1 else (1, groups)))
    shifts = [step * (count - 1 - part) for part in range(count)]
    codes = torch.cat([parts[".W_q"] >> shift & ((1 << bits) - 1) for shift in shifts])[: shape[0]]
    weight = (codes.float() - parts[".zero"].float()) * parts[".scale"].float()
    return weight.reshape(rows, columns).to(dtype)
