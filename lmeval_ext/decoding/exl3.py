"""Decodes EXL3 to dense weights in plain PyTorch: any device, no kernels.

The format, as exllamav3 1.6.5 defines it (QTIP's trellis coding, arXiv:2406.11235, in the engine's own layout):

- A matrix of `in` × `out` weights is cut into tiles of 16 × 16. `trellis` is int16 [in / 16, out / 16, 16 * K], K bits
  per weight. A tile's 16 * K words are a ring of 256 * K bits: int32 words in memory order, each read from its highest
  bit; that is, of each two int16 the second comes first (exllamav3_ext/quant/pack.cu).
- Position i of a tile adds its bits to the ring up to bit S(i) = ⌊(i + 1) · K⌋, and its state is the 16 bits that end
  there, so states overlap, and the first ones wrap around the ring's end. K is 1 to 8, or 1.5, 2.5, 3.5, where odd
  positions have the extra bit (exl3_dq.cuh, frac.cu).
- A state's value comes from a codebook that is computed, not stored: `codebook` below (codebook.cuh).
- Positions follow the order in which tensor cores hold a 16 × 16 operand: position 8 t + j is in row
  2 (t mod 4) + (j mod 2) + 8 (j / 2 mod 2), column t / 4 + 8 (j / 4) (reconstruct.cu).
- These values, `inner`, are the weights after a Hadamard rotation of each 128 inputs and each 128 outputs:
  W = diag(suh) · H · inner · H · diag(svh), H the 128 × 128 Sylvester matrix over √128, suh and svh float16 signs
  times scales (modules/quant/exl3.py, get_weight_tensor). Older files have suh and svh as packed sign bits su and sv.

The format defines `inner` to the last bit. The engine rounds the product with H, suh, H and svh to float16
after each of the four; `decode` works in float32 and rounds once.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from lmeval_ext.decoding.parts import Matrix, Parts

TILE = 16
BLOCK = 128  # size of the Hadamard rotation
HALF_RATES = (1.5, 2.5, 3.5)

# Multiplier and addend of the generators; a checkpoint names mcg and mul1 by a tensor that holds the multiplier
MULTIPLIERS = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_ADDENDS = {"3inst": 64248484, "mcg": 0, "mul1": 0}


def decode_parts(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One matrix, dtype [out, in]. parts: its tensors by suffix. Raises ValueError for an unknown codebook."""
    names = [name for name in ("mcg", "mul1") if f".{name}" in parts]
    name = names[0] if names else "3inst"
    if names:
        multiplier = int(parts[f".{name}"].item()) & 0xFFFFFFFF
        if len(names) > 1 or multiplier != MULTIPLIERS[name]:
            raise ValueError(f"an unknown codebook: {' and '.join(names)}, multiplier {multiplier:#x}")
    sides = [parts[f".{s}h"] if f".{s}h" in parts else signs(parts[f".{s}"]) for s in ("su", "sv")]
    return decode(parts[".trellis"], sides[0], sides[1], name, dtype)


def decode(
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    name: str,
    dtype: torch.dtype = torch.float16,
    elements: int = 1 << 20,
) -> torch.Tensor:
    """The dense weight as Transformers stores it: dtype [out, in], computed in float32 and rounded once.

    trellis, name: as for `inner`; suh: float16 [in], svh: float16 [out]. At most about `elements` weights are
    processed at a time. Raises ValueError if the tensors do not fit together.
    """
    rows, columns = trellis.shape[0] * TILE, trellis.shape[1] * TILE
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(f"{rows} x {columns} weights: both must be multiples of {BLOCK}")
    if suh.shape != (rows,) or svh.shape != (columns,):
        raise ValueError(f"suh {list(suh.shape)} and svh {list(svh.shape)} do not fit {rows} x {columns} weights")
    rotate = hadamard(trellis.device)
    left, right = suh.float()[:, None] / BLOCK, svh.float()
    out = torch.empty((columns, rows), dtype=dtype, device=trellis.device)
    step = max(1, elements // (rows * BLOCK)) * BLOCK
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        part = inner(trellis[:, start // TILE : stop // TILE], name).float()
        part = (rotate @ part.view(-1, BLOCK, stop - start)).view(rows, -1, BLOCK) @ rotate
        out[start:stop] = (part.view(rows, -1) * left * right[start:stop]).T.to(dtype)
    return out


def inner(trellis: torch.Tensor, name: str) -> torch.Tensor:
    """The rotated weights, exactly as the format defines them: float16 [in, out].

    trellis: int16 [in / 16, out / 16, 16 * K]; name: of the codebook. Raises ValueError if they are not EXL3.
    """
    if trellis.dtype != torch.int16 or trellis.dim() != 3:
        raise ValueError(f"the trellis is {trellis.dtype} {list(trellis.shape)}, expected int16 of three dimensions")
    if width(trellis.shape[-1]) in HALF_RATES and name != "mul1":
        raise ValueError(f"{width(trellis.shape[-1])} bits per weight go with the mul1 codebook only, this is {name}")
    rows, columns, _ = trellis.shape
    table = codebook(name, trellis.device)
    tiles = table[states(trellis)].view(rows, columns, TILE, TILE)
    return tiles.transpose(1, 2).reshape(rows * TILE, columns * TILE)


def states(trellis: torch.Tensor) -> torch.Tensor:
    """The 16-bit state of every weight: int32 [..., 256], each tile row by row. trellis: int16 [..., 16 * K]."""
    words = trellis.shape[-1]
    first, shift = _windows(words, trellis.device)
    stream = trellis.reshape(*trellis.shape[:-1], words // 2, 2).flip(-1).reshape(trellis.shape).int() & 0xFFFF
    pairs = (stream << 16) | stream.roll(-1, -1)
    return (pairs[..., first] >> shift) & 0xFFFF


@lru_cache(maxsize=8)
def codebook(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The value of every 16-bit state: float16 [65536]. name: 3inst, mcg or mul1.

    x = state · multiplier + addend mod 2³². 3inst and mcg: both halves of (x & 8FFF8FFF) ^ 3B603B60 are float16
    numbers, and their sum, rounded to float16, is the value. mul1: s · 0.00677 − 10.383 for s = 1024 + the sum of x's
    four bytes, the constants being the float16 numbers 1EEE and C931; rounded once to float16, as by a fused
    multiply-add (in float32 product and sum are exact: all are multiples of 2⁻¹⁸ below 16).
    """
    x = (torch.arange(65536, dtype=torch.int64) * MULTIPLIERS[name] + _ADDENDS[name]) & 0xFFFFFFFF
    if name == "mul1":
        total = 1024 + sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24))
        factor, offset = torch.tensor([0x1EEE, 0xC931 - 0x10000], dtype=torch.int16).view(torch.float16).float()
        return (total * factor + offset).half().to(device)
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (_as_half(part) for part in (x & 0xFFFF, x >> 16))
    return (low.float() + high.float()).half().to(device)


@lru_cache(maxsize=4)
def hadamard(device: torch.device | str = "cpu") -> torch.Tensor:
    """The Sylvester matrix of order 128 with entries ±1: float32, symmetric; its square is 128 times the identity."""
    matrix = torch.ones(1, 1)
    while len(matrix) < BLOCK:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device)


def signs(packed: torch.Tensor) -> torch.Tensor:
    """su or sv of older files as float16 [16 * n] of ±1. packed: int16 [n], signs from the lowest bit, 1 for minus."""
    bits = (packed.int()[:, None] >> torch.arange(16, device=packed.device)) & 1
    return (1 - 2 * bits).half().flatten()


def width(words: int) -> float:
    """Bits per weight, from the length of a tile in int16 words. Raises ValueError for a width that EXL3 lacks."""
    bits = words / TILE
    if bits not in (*range(1, 9), *HALF_RATES):
        raise ValueError(f"a tile of {words} words is {bits:g} bits per weight; EXL3 has 1 to 8, 1.5, 2.5 and 3.5")
    return bits


@lru_cache(maxsize=16)
def _windows(words: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each element's state starts, elements row by row: (index of its first 16-bit word, shift), both [256].

    The state is 16 bits of two neighbouring words, first word high: (pair >> shift) & FFFF.
    """
    element = torch.arange(TILE * TILE)
    row, column = element // TILE, element % TILE
    lane = row % 8 // 2 + 4 * (column % 8)
    position = 8 * lane + row % 2 + 2 * (row // 8) + 4 * (column // 8)
    twice = round(2 * width(words))
    start = ((position + 1) * twice // 2 - 16) % (16 * words)
    return (start // 16).to(device), (16 - start % 16).to(device, torch.int32)


def _as_half(patterns: torch.Tensor) -> torch.Tensor:
    """The float16 numbers with the 16-bit patterns in an int64 tensor."""
    return torch.where(patterns >= 0x8000, patterns - 0x10000, patterns).to(torch.int16).view(torch.float16)
