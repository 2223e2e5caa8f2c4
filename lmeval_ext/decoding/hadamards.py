"""Hadamard matrices of QTIP's orders: products of Sylvester's matrices with twelve others, by their constructions.

Sources: R. E. A. C. Paley, On orthogonal matrices, 1933 (I: orders q + 1, II: 2 (q + 1)); J. Williamson, Hadamard's
determinant theorem and the sum of four squares, 1944; the first rows of Williamson's blocks are those of N. J. A.
Sloane's public tables (http://neilsloane.com/hadamard).
"""

from __future__ import annotations

from functools import lru_cache

import torch

# First rows of the circulant blocks A, B, C, D; one may stand for several
_WILLIAMSON: dict[int, tuple[str, str, str, str]] = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    116: (
        "++--+--+-+++-++++-+++-+--+--+", "++++-++-+---++++++---+-++-+++", "+-+---++--+-++++++-+--++---+-",
        "+++---++--+-+----+-+--++---++",
    ),
    124: (
        "+--+++-+--+----++----+--+-+++--", "+--+++-+--+----++----+--+-+++--", "+-----+++-+-+--++--+-+-+++-----",
        "++++++---+-+-++--++-+-+---+++++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++", "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++", "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---", "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++", "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}  # fmt: skip
_PALEY_1 = frozenset({12, 20, 60, 108, 140})
_PALEY_2 = frozenset({28, 36})
ORDERS = tuple(sorted({*_WILLIAMSON, *_PALEY_1, *_PALEY_2}, reverse=True))


def core_order(size: int) -> int:
    """The factor K of a dimension: the first of `ORDERS` that divides it, else 1.

    Raises ValueError if size / K is not a power of two.
    """
    order = next((k for k in ORDERS if size > 0 and size % k == 0), 1)
    rest = size // order
    if rest < 1 or rest & (rest - 1):
        raise ValueError(f"there is no Hadamard matrix for {size}: {size} / {order} is not a power of two")
    return order


@lru_cache(maxsize=16)
def core(order: int) -> torch.Tensor:
    """The matrix of one of `ORDERS`, or [[1]]: entries ±1, float32, H · Hᵀ = order · identity."""
    if order == 1:
        return torch.ones(1, 1)
    if order in _PALEY_1:
        return _paley_1(order)
    if order in _PALEY_2:
        return _paley_2(order)
    return _williamson(order)


def rotate(matrix: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """(H ⊗ S) / √n times a dimension of n entries: H the core of this order, S Sylvester's matrix of n / order.

    matrix: float32 of two dimensions. dim: the dimension that is multiplied, 0 or 1.
    """
    if dim == 1:
        return rotate(matrix.T, 0, order).T
    size, columns = matrix.shape
    rows = matrix.reshape(order, size // order, columns)
    step = 1
    while step < size // order:  # the fast Walsh-Hadamard transform
        pairs = rows.reshape(order, -1, 2, step, columns)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        step *= 2
    rows = core(order).to(matrix.device) @ rows.reshape(order, -1)
    return rows.reshape(size, columns) / size**0.5


def _character(modulus: int) -> torch.Tensor:
    """χ(c − r) for all r, c: the Legendre symbol modulo a prime, 0 on the diagonal."""
    squares = {x * x % modulus for x in range(1, modulus)}
    value = torch.tensor([0.0, *(1.0 if x in squares else -1.0 for x in range(1, modulus))])
    index = torch.arange(modulus)
    return value[(index[None] - index[:, None]) % modulus]


def _paley_1(order: int) -> torch.Tensor:
    matrix = torch.ones(order, order)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = torch.eye(order - 1) - _character(order - 1)
    return matrix


def _paley_2(order: int) -> torch.Tensor:
    size = order // 2
    block = torch.ones(size, size)
    block[0, 0] = 0
    block[1:, 1:] = _character(size - 1)
    plus, minus = block + torch.eye(size), block - torch.eye(size)
    return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])


def _williamson(order: int) -> torch.Tensor:
    index = torch.arange(order // 4)
    place = (index[None] - index[:, None]) % (order // 4)
    a, b, c, d = (torch.tensor([1.0 if s == "+" else -1.0 for s in row])[place] for row in _WILLIAMSON[order])
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])
