"""Decodes EXL2 to dense weights in plain PyTorch: any device, no kernels.

The format, as exllamav2 0.3.2 defines it (exllamav2_ext/cuda/q_matrix.cu, quant/qdq_*.cuh, conversion/adaptivegptq.py):

- The rows (inputs) of a matrix of `in` × `out` weights are sorted, and divided into groups of one width each: 8, 6, 5,
  4, 3 or 2 bits. `q_groups` is int16 [2 * groups]: each group's bits, and its first row in `q_weight`.
- `q_weight` is int32 [words, out]: down each column, a group is one stream of codes, lowest bit first, without gaps.
  A code q of b bits is the integer q − 2^(b − 1).
- `q_scale` is int32 [groups, out / 8], eight 4-bit codes per int32, lowest first; `q_scale_max` is float16 [groups]. A
  group's scale in a column is (code + 1)² · (q_scale_max / 256), a weight the integer times that; each product, and
  the quotient, is rounded to float16 (ext.py make_q_matrix, qdq_util.cuh dq_scale).
- `q_invperm` gives the sorted row of each input; files may have its inverse `q_perm` instead.

So every weight is a float16 number, defined to the last bit.
"""

from __future__ import annotations

import torch

from lmeval_ext.decoding.parts import Matrix, Parts

WIDTHS = (2, 3, 4, 5, 6, 8)


def decode_parts(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One matrix, dtype [out, in]. parts: its tensors by suffix."""
    order = parts[".q_invperm"] if ".q_invperm" in parts else (parts[".q_perm"].long() & 0xFFFF).argsort()
    return decode(parts[".q_weight"], parts[".q_scale"], parts[".q_scale_max"], parts[".q_groups"], order, dtype)


def decode(
    q_weight: torch.Tensor,
    q_scale: torch.Tensor,
    q_scale_max: torch.Tensor,
    q_groups: torch.Tensor,
    q_invperm: torch.Tensor,
    dtype: torch.dtype = torch.float16,
    elements: int = 1 << 22,
) -> torch.Tensor:
    """The dense weight as Transformers stores it: dtype [out, in]. The tensors are those of the module's docstring.

    In float16 and float32 the values equal the engine's bit for bit. At most about `elements` weights are processed at
    a time. Raises ValueError if the tensors do not fit together.
    """
    rows, columns = len(q_invperm), q_weight.shape[1]
    layout = groups(q_groups, len(q_weight), rows)
    if q_scale.shape != (len(layout), columns // 8) or q_scale_max.shape != (len(layout),):
        raise ValueError(
            f"q_scale {list(q_scale.shape)} and q_scale_max {list(q_scale_max.shape)} do not fit {len(layout)} groups "
            f"of {columns} columns"
        )
    order = q_invperm.long() & 0xFFFF
    if not torch.equal(order.sort().values, torch.arange(rows, device=order.device)):
        raise ValueError("q_invperm is not a permutation of the inputs")
    out = torch.empty((columns, rows), dtype=dtype, device=q_weight.device)
    step = max(1, elements // rows // 8) * 8
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        scale = scales(q_scale[:, start // 8 : stop // 8], q_scale_max)
        sorted_rows = _sorted(q_weight[:, start:stop], layout, scale)
        out[start:stop] = sorted_rows[order].T.to(dtype)
    return out


def groups(q_groups: torch.Tensor, words: int, rows: int) -> list[tuple[int, int, int]]:
    """(bits, first word, end word) of every group. words: rows of q_weight; rows: inputs of the matrix.

    Raises ValueError if the groups are not EXL2 or do not fill the matrix.
    """
    flat = [value & 0xFFFF for value in q_groups.flatten().tolist()]
    widths, starts = flat[0::2], [*flat[1::2], words]
    layout, rows_covered = [], 0
    for bits, start, end in zip(widths, starts, starts[1:], strict=False):
        if bits not in WIDTHS or end <= start:
            raise ValueError(f"a group of {bits} bits in rows {start} to {end} of q_weight; EXL2 has {WIDTHS} bits")
        layout.append((bits, start, end))
        rows_covered += (end - start) * 32 // bits  # the last group's last word may not be full
    if rows_covered < rows or starts[0]:
        raise ValueError(f"the groups hold {rows_covered} of {rows} rows")
    return layout


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `bits` bits from int32 [words, columns], lowest bit first: int64 [words * 32 // bits, columns]."""
    stream = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 0, 0, 1))
    start = torch.arange(len(words) * 32 // bits, device=words.device) * bits
    first, shift = start // 32, (start % 32)[:, None]
    return ((stream[first] | stream[first + 1] << 32) >> shift) & ((1 << bits) - 1)


def scales(q_scale: torch.Tensor, q_scale_max: torch.Tensor) -> torch.Tensor:
    """The scale of every group and column: float16 [groups, columns]."""
    codes = (q_scale[:, :, None] >> (4 * torch.arange(8, device=q_scale.device))) & 0xF
    largest = (q_scale_max.float() / 256).half()
    return ((codes.flatten(1) + 1) ** 2 * largest.float()[:, None]).half()


def _sorted(q_weight: torch.Tensor, layout: list[tuple[int, int, int]], scale: torch.Tensor) -> torch.Tensor:
    """The weights in the order of q_weight: float16 [rows including padding of the last word, columns]."""
    parts = []
    for group, (bits, start, end) in enumerate(layout):
        integers = unpack(q_weight[start:end], bits) - (1 << (bits - 1))
        parts.append((integers.float() * scale[group].float()).half())
    return torch.cat(parts)
