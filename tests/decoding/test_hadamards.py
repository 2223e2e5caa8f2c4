"""The Hadamard matrices of QTIP's orders, against published ones and against their definition."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmeval_ext.decoding.hadamards import ORDERS, core, core_order, rotate


@pytest.mark.parametrize("order", [k for k in ORDERS if k not in (20, 124)])  # theirs of these two are others
def test_cores_equal_those_of_compressed_tensors(order: int) -> None:
    spec = find_spec("compressed_tensors")  # located only: its import takes seconds
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or () for file in Path(place).rglob("hadamards.safetensors")]
    if not files:
        pytest.skip("no compressed-tensors with a table of Hadamard matrices")
    assert torch.equal(core(order), load_file(files[0])[str(order)].float())


@pytest.mark.parametrize("order", ORDERS)
def test_cores_are_hadamard_matrices(order: int) -> None:
    matrix = core(order).double()
    assert set(matrix.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_core_of_20_is_paleys_by_hand() -> None:
    squares = {pow(x, 2, 19) for x in range(1, 19)}
    for r in range(19):
        for c in range(19):
            expected = 1 if r == c else -1 if (c - r) % 19 in squares else 1
            assert core(20)[1 + r, 1 + c] == expected


@pytest.mark.parametrize("size", [64, 384, 320, 112])
def test_rotation_is_the_product_with_an_explicit_matrix(size: int) -> None:
    from scipy.linalg import hadamard

    order = core_order(size)
    matrix = np.kron(core(order).double().numpy(), hadamard(size // order)) / np.sqrt(size)
    values = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
    expected = matrix @ values.double().numpy()
    np.testing.assert_allclose(rotate(values, 0, order).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(rotate(values.T.contiguous(), 1, order).numpy(), expected.T, atol=1e-5)


def test_sizes_without_a_rotation_are_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix for 88"):
        core_order(88)
