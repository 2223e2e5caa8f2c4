"""Decodes QTIP to dense weights in plain PyTorch: any device, no kernels.

The format (arXiv:2406.11235), from a description of its layout. A matrix is
W = diag(SV) · Gₒ · inner · Gᵢᵀ · diag(SU), G a Hadamard rotation (`hadamards.rotate`), and `inner` [out, in] is
trellis-coded in tiles of td_x outputs × td_y inputs:

- `trellis` int16 (read as uint16) [tiles, ⌈td_x td_y K / 16⌉]: each tile is a ring of td_x td_y K bits. Step t has as
  its state the L bits that begin at bit t K V of the ring, highest first; it gives V weights, at positions t V + u.
- A state's V values come from a codebook by `decode_mode`, of the stored `tlut` or computed (`codebook`).
- Plain layout: tiles row by row, words from their highest bit, position p in row p // td_y, column p mod td_y.
  Kernel layout, of the settings that QTIP's own kernels know (`_is_kernel_layout`): the tensor is bytes
  [out / 32, in / 32, 32, 2, 2, K] = [I, J, s, b, a, k], tile (2 I + a, 2 J + b) has for each s its bytes from k = K − 1
  down to 0, and position p is in row (p >> 5) + 8 ((p >> 1) & 1), column 2 ((p >> 3) & 3) + (p & 1) + 8 ((p >> 2) & 1).
- `SU` [in], `SV` [out]: floats. `rcp` (0-d): 1, the rotation of the inputs is in `tp_rank` equal blocks; 2, that of the
  outputs; 0, neither. Files without the two have 0 and 8. The core of a block is that of the whole dimension.

EXL3 (`exl3`) has the same kind of trellis with states that end where QTIP's begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lmeval_ext.decoding import exl3
from lmeval_ext.decoding.hadamards import core_order, rotate
from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape

TABLE_MODES = ("lut", "quantlut", "quantlut_sym")
COMPUTED_MODES = ("1mad", "2mad", "3inst")
_KERNEL = {"decode_mode": "quantlut_sym", "L": 16, "V": 2, "tlut_bits": 9, "td_x": 16, "td_y": 16}
_KERNEL_BITS = (2, 3, 4)
_MAD_MEAN, _MAD_SCALE = 510, 147.800537109375


@dataclass(frozen=True)
class Settings:
    """`quip_params` of config.json, for one matrix: state of L bits, K bits per weight, V weights per step."""

    L: int
    K: int
    V: int
    tlut_bits: int
    decode_mode: str
    td_x: int
    td_y: int


def decode(parts: Parts, dtype: torch.dtype, matrix: Matrix, elements: int = 1 << 24) -> torch.Tensor:
    """One matrix, dtype [out, in], computed in float32 and rounded once. Raises ValueError if parts do not fit."""
    settings = settings_of(matrix)
    su, sv = parts[".SU"], parts[".SV"]
    expect(su.dim() == 1 and sv.dim() == 1, f"SU {list(su.shape)} and SV {list(sv.shape)} are not vectors")
    weight = inner(parts, len(sv), len(su), settings)
    rcp = int(parts[".rcp"].item()) if ".rcp" in parts else 0
    blocks = int(parts[".tp_rank"].item()) if ".tp_rank" in parts else 8
    expect(rcp in (0, 1, 2) and blocks > 0, f"rcp is {rcp} and tp_rank {blocks}, expected 0, 1 or 2, and 1 or more")
    weight = _rotated(weight, 1, blocks if rcp == 1 else 1)
    weight = _rotated(weight, 0, blocks if rcp == 2 else 1)
    return (weight * sv.float()[:, None] * su.float()).to(dtype)


def settings_of(matrix: Matrix) -> Settings:
    """The parameters of a matrix: those of the checkpoint, with `K_v_proj` for v_proj. Raises ValueError if invalid."""
    config: Mapping[str, Any] = matrix.quantization
    expect(config.get("codebook", "bitshift") == "bitshift", f"codebook {config.get('codebook')!r} is not known here")
    values = {name: config.get(name) for name in ("L", "K", "V", "tlut_bits", "td_x", "td_y")}
    if config.get("K_v_proj") is not None and matrix.name.endswith("v_proj"):
        values["K"] = config.get("K_v_proj")
    for name, value in values.items():
        expect(type(value) is int and value > 0, f"quip_params in config.json has {name} {value}, expected an integer")
    mode = config.get("decode_mode")
    expect(mode in TABLE_MODES + COMPUTED_MODES, f"quip_params in config.json has decode_mode {mode!r}, not known here")
    settings = Settings(**values, decode_mode=mode)  # type: ignore[arg-type]
    expect(settings.L <= 16, f"states of {settings.L} bits, expected 16 or fewer")
    expect(mode in TABLE_MODES or settings.V == 1, f"decode_mode {mode} with V {settings.V}, expected 1")
    expect(mode != "3inst" or settings.L == 16, f"decode_mode 3inst with states of {settings.L} bits, expected 16")
    expect(
        mode != "lut" or settings.tlut_bits == settings.L,
        f"a table of 2^{settings.tlut_bits} for 2^{settings.L} states",
    )
    tile = settings.td_x * settings.td_y
    expect(tile % settings.V == 0 and tile * settings.K >= settings.L, f"tiles of {tile} weights do not fit")
    return settings


def inner(parts: Parts, rows: int, columns: int, settings: Settings) -> torch.Tensor:
    """The rotated weights, exactly as the format defines them: float32 [out, in].

    Raises ValueError if the tensors do not fit together.
    """
    s = settings
    expect(
        rows % s.td_x == 0 and columns % s.td_y == 0, f"{rows} x {columns} weights are not tiles of {s.td_x} x {s.td_y}"
    )
    trellis = parts[".trellis"]
    down, across, size = rows // s.td_x, columns // s.td_y, s.td_x * s.td_y
    expect(trellis.dtype == torch.int16, f"trellis is {trellis.dtype}, expected int16")
    expect_shape(parts, ".trellis", down * across, -(-size * s.K // 16))
    table = codebook(parts, s)  # [2^L, V]
    kernel = _is_kernel_layout(s)
    expect(not kernel or (rows % 32 == 0 and columns % 32 == 0), f"{rows} x {columns} weights are not pairs of tiles")
    ring = _kernel_bytes(trellis, down, across, s.K) if kernel else _plain_bytes(trellis)
    position = _kernel_positions(trellis.device) if kernel else torch.arange(size, device=trellis.device)
    out = torch.empty((down, s.td_x, across, s.td_y), device=trellis.device)
    step = max(1, (1 << 21) // (across * size))  # rows of tiles at a time
    for start in range(0, down, step):
        tiles = ring[start * across : (start + step) * across]
        values = table[_states(tiles, s)].flatten(1)  # by position
        block = values[:, position].view(-1, across, s.td_x, s.td_y)
        out[start : start + step] = block.transpose(1, 2)
    return out.reshape(rows, columns)


def codebook(parts: Parts, settings: Settings) -> torch.Tensor:
    """The values of every state: float32 [2^L, V]. Raises ValueError if the table is missing or does not fit."""
    s = settings
    if s.decode_mode in COMPUTED_MODES:
        expect(".tlut" not in parts, f"it has a table, which decode_mode {s.decode_mode} does not use")
        device = parts[".trellis"].device
        if s.decode_mode == "3inst":
            return exl3.codebook("3inst", device).float()[:, None]
        return _mad(s.decode_mode, s.L).to(device)[:, None]
    expect(".tlut" in parts, f"it has no tensor '.tlut', which decode_mode {s.decode_mode} needs")
    expect_shape(parts, ".tlut", 1 << s.tlut_bits, s.V)
    table = parts[".tlut"].float()
    state = torch.arange(1 << s.L, device=table.device)
    product = state * (state + 1)
    mask = (1 << s.tlut_bits) - 1
    if s.decode_mode == "lut":
        return table
    if s.decode_mode == "quantlut":
        return table[product >> (16 - s.tlut_bits) & mask]
    values = table[product >> (15 - s.tlut_bits) & mask]
    values[:, 0] *= 1 - 2 * (product >> 15 & 1)
    return values


@lru_cache(maxsize=4)
def _mad(mode: str, bits: int) -> torch.Tensor:
    """1mad and 2mad: the sum of the four bytes of a pseudo-random number, shifted and scaled. float32 [2^bits]."""
    state = torch.arange(1 << bits)
    if mode == "1mad":
        x = (34038481 * state + 76625530) & 0xFFFFFFFF
    else:
        x = (264435761 * state + 1013904223) & 0xFFFFFFFF
        x = ((x * 1664525 >> 32) + x) & 0xFFFFFFFF
    total = sum((x >> shift & 0xFF for shift in (0, 8, 16, 24)), torch.zeros_like(x))
    return (total - _MAD_MEAN).float() / _MAD_SCALE


def _states(tiles: torch.Tensor, s: Settings) -> torch.Tensor:
    """The state of every step: int64 [tiles, steps]. tiles: uint8 [tiles, bytes], each a ring of td_x·td_y·K bits."""
    size = s.td_x * s.td_y * s.K
    start = torch.arange(0, size, s.K * s.V, device=tiles.device)
    bits = tiles.new_tensor(range(7, -1, -1))
    stream = (tiles[..., None] >> bits & 1).flatten(1)[:, :size]
    state = torch.zeros((len(tiles), len(start)), dtype=torch.int32, device=tiles.device)
    for offset in range(s.L):
        state = state << 1 | stream[:, (start + offset) % size]
    return state.long()


def _plain_bytes(trellis: torch.Tensor) -> torch.Tensor:
    """uint8 [tiles, bytes] in the order of the ring: of each word the high byte first."""
    words = trellis.int() & 0xFFFF
    return torch.stack([words >> 8, words & 0xFF], -1).flatten(1).to(torch.uint8)


def _kernel_bytes(trellis: torch.Tensor, down: int, across: int, bits: int) -> torch.Tensor:
    """uint8 [tiles, 32 · bits] in the order of the ring, tiles row by row, from the kernels' layout."""
    words = trellis.int().flatten() & 0xFFFF
    stored = torch.stack([words & 0xFF, words >> 8], -1).to(torch.uint8)  # in memory the low byte comes first
    fields = stored.view(down // 2, across // 2, 32, 2, 2, bits).flip(-1)  # [I, J, s, b, a, k]
    return fields.permute(0, 4, 1, 3, 2, 5).reshape(down * across, 32 * bits)


@lru_cache(maxsize=4)
def _kernel_positions(device: torch.device | str) -> torch.Tensor:
    """The position of each weight of a tile, weights row by row: int64 [256]."""
    p = torch.arange(256)
    row = (p >> 5) + 8 * (p >> 1 & 1)
    column = 2 * (p >> 3 & 3) + (p & 1) + 8 * (p >> 2 & 1)
    return (16 * row + column).argsort().to(device)


def _is_kernel_layout(s: Settings) -> bool:
    return s.K in _KERNEL_BITS and all(getattr(s, name) == value for name, value in _KERNEL.items())


def _rotated(weight: torch.Tensor, dim: int, blocks: int) -> torch.Tensor:
    """G · weight (dim 0) or weight · Gᵀ (dim 1), in equal blocks. Raises ValueError where the size has no rotation."""
    size = weight.shape[dim]
    order = core_order(size)
    part = size // blocks
    rest = part // order
    expect(
        part * blocks == size and rest * order == part and rest & (rest - 1) == 0,
        f"{size} rows or columns cannot be rotated in {blocks} blocks",
    )
    return torch.cat([rotate(piece, dim, order) for piece in weight.split(part, dim)], dim)
