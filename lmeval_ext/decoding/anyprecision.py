"""Decodes Any-Precision LLM to dense weights in plain PyTorch: any device, no kernels.

The format (arXiv:2402.10517; any-precision-llm a3257d0, pack.py and kernels/dequant.cuh): one file holds the model at
every precision from `seed_precision` to `parent_precision` P. The code of B bits is the B highest bits of the code of
P bits, and each output has one table of values per precision.

- `qweight` int32 [P, out, in / 32]: bit planes, plane 0 the highest bit.
- `lut{B}` float16 [out, 2^B]: W[r, c] = lut{B}[r, code].
- Where the bit of a column is: columns come in chunks of 1024, the last one may be shorter. With T words in the chunk,
  bit 31 − 8 j − k of word t belongs to column 8 T j + 8 t + k of the chunk (j = 0…3, k = 0…7).
"""

from __future__ import annotations

from typing import Any

import torch

from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape

CHUNK = 1024  # columns


def decode(parts: Parts, dtype: torch.dtype, matrix: Matrix, elements: int = 1 << 22) -> torch.Tensor:
    """One matrix at matrix.precision (None: the highest), dtype [out, in].

    At most about `elements` weights are processed at a time. Raises ValueError if the tensors do not fit together.
    """
    lowest, highest = precisions(matrix.quantization)
    precision = highest if matrix.precision is None else matrix.precision
    expect(lowest <= precision <= highest, f"precision {precision} is not within {lowest} to {highest}")
    qweight = parts[".qweight"]
    expect(qweight.dim() == 3, f"qweight has the shape {list(qweight.shape)}, expected [planes, out, in / 32]")
    planes, rows, words = qweight.shape
    expect(planes == highest, f"qweight has {planes} planes, but config.json says parent_precision {highest}")
    for bits in range(lowest, highest + 1):
        expect(f".lut{bits}" in parts, f"it has no table lut{bits}")
        expect_shape(parts, f".lut{bits}", rows, 1 << bits)
    for suffix in parts.keys() - {".qweight", *(f".lut{bits}" for bits in range(lowest, highest + 1))}:
        raise ValueError(f"it has {suffix[1:]}, but config.json says precisions {lowest} to {highest}")
    table, word, shift = parts[f".lut{precision}"], *places(words, qweight.device)
    out = torch.empty((rows, 32 * words), dtype=dtype, device=qweight.device)
    step = max(1, elements // (32 * words))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        code = torch.zeros((len(out[chunk]), 32 * words), dtype=torch.int64, device=qweight.device)
        for plane in range(precision):
            code = code << 1 | qweight[plane, chunk][:, word] >> shift & 1
        out[chunk] = table[chunk].gather(1, code).to(dtype)
    return out


def places(words: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """For every column of a row of `words` words: the word that holds its bit, and the shift to it."""
    word, shift = [], []
    for first in range(0, words, CHUNK // 32):
        length = min(CHUNK // 32, words - first)
        column = torch.arange(32 * length)
        part, within = column // (8 * length), column % (8 * length)
        word.append(first + within // 8)
        shift.append(31 - 8 * part - within % 8)
    return torch.cat(word).to(device), torch.cat(shift).to(device, torch.int32)


def precisions(quantization: Any) -> tuple[int, int]:
    """The lowest and the highest precision of a checkpoint, from `anyprec` in its config.json.

    Raises ValueError where it names none.
    """
    low, high = (quantization.get(key) for key in ("seed_precision", "parent_precision"))
    fits = isinstance(low, int) and isinstance(high, int) and 1 <= low <= high <= 8
    expect(fits, f"anyprec in config.json has seed_precision {low} and parent_precision {high}, expected 1 to 8")
    expect(quantization.get("group_count", 1) == 1, f"group_count {quantization.get('group_count')} is not known here")
    return int(low), int(high)
