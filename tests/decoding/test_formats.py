"""Decoders of all formats but EXL2 and EXL3, weight by weight against a second decode (`packers`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lmeval_ext.decoding import anyprecision, aqlm, floats, hqq, qtip, vptq
from lmeval_ext.decoding.parts import Matrix
from tests.decoding import packers
from tests.decoding.packers import Packed

DECODERS: dict[str, Callable[..., torch.Tensor]] = {
    "fp8": floats.fp8, "nvfp4": floats.nvfp4, "nvfp4_packed": floats.nvfp4,
    "mxfp4": floats.mxfp4, "aqlm": aqlm.decode, "vptq": vptq.decode,
    "anyprecision": anyprecision.decode, "hqq": hqq.decode, "qtip": qtip.decode,
}  # fmt: skip
NAME = "model.layers.0.mlp.down_proj"
_KERNEL: dict[str, Any] = {"state": 16, "table_bits": 9}

# (packer, its arguments): every layout that the format has
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("fp8", {"scale": scale}) for scale in ("tensor", "number", "row", "vector", "block", "mx")),
    ("nvfp4", {}),
    ("nvfp4", {"pre_scale": True}),
    ("nvfp4_packed", {}),
    ("mxfp4", {}),
    ("aqlm", {"books": 2, "bits": 8}),
    ("aqlm", {"books": 1, "bits": 12}),
    ("aqlm", {"books": 1, "bits": 16, "width": 16}),
    ("aqlm", {"books": 3, "bits": 6, "height": 2, "width": 4}),
    ("vptq", {}),
    ("vptq", {"residual": 0}),
    ("vptq", {"residual": 32, "vector": 6}),  # a residual book larger than the main one
    ("vptq", {"outliers": 16, "vector": 12}),
    ("vptq", {"groups": 2, "perm": False}),
    ("vptq", {"norm": False}),
    ("vptq", {"packed": False, "outliers": 16}),
    *(("anyprecision", {"low": 2, "high": 5, "precision": bits}) for bits in (2, 3, 5)),
    ("anyprecision", {"low": 3, "high": 8}),
    *(("hqq", {"bits": bits, "axis": axis}) for bits in (8, 4, 2, 1) for axis in (0, 1)),
    ("hqq", {"bits": 3}),
    ("qtip", {}),
    ("qtip", {"rcp": 1}),
    ("qtip", {"rcp": 2, "blocks": 4}),
    *(("qtip", {"bits": bits, **_KERNEL}) for bits in (2, 3, 4)),
    ("qtip", {"bits": 1, "state": 12}),
    ("qtip", {"bits": 2, "state": 10, "table_bits": 10, "mode": "lut", "step": 1, "tile": (8, 32)}),
    ("qtip", {"bits": 2, "state": 10, "table_bits": 8, "mode": "quantlut"}),
    *(("qtip", {"bits": 3, "state": 12, "step": 1, "mode": mode}) for mode in ("1mad", "2mad")),
    ("qtip", {"bits": 2, "state": 16, "step": 1, "mode": "3inst"}),
]


def decode(kind: str, packed: Packed, dtype: torch.dtype = torch.float32, **more: Any) -> torch.Tensor:
    config = packed.config
    if kind == "vptq":
        config = {"quant_method": "vptq", "config_for_layers": {NAME: config["layer"]}}
    parts = {suffix: tensor for suffix, tensor in packed.tensors.items() if suffix != ".input_scale"}
    return DECODERS[kind](parts, dtype, Matrix(NAME, config, **more))


@pytest.mark.parametrize(("kind", "arguments"), CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_decoded_weights_equal_a_second_decode(kind: str, arguments: dict[str, Any]) -> None:
    packed = getattr(packers, kind)(1, 64, 96, **arguments)
    precision = arguments.get("precision")
    weights = decode(kind, packed, precision=precision)
    assert weights.shape == (64, 96)
    assert weights.dtype == torch.float32
    scale = np.abs(packed.weights).max()
    np.testing.assert_allclose(weights.numpy(), packed.weights, rtol=3e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("size", [32, 96, 1024, 1152])
def test_anyprecision_planes_are_in_chunks_of_1024(size: int) -> None:
    packed = packers.anyprecision(2, 4, size, 3, 4)
    np.testing.assert_array_equal(decode("anyprecision", packed).double().numpy(), packed.weights)


@pytest.mark.parametrize("kind", ["aqlm", "anyprecision", "qtip"])
def test_parts_of_a_matrix_equal_the_matrix(kind: str) -> None:
    """Large matrices are decoded in pieces."""
    packed = getattr(packers, kind)(3, 64, 96)
    parts, matrix = packed.tensors, Matrix(NAME, packed.config)
    pieces = DECODERS[kind](parts, torch.float16, matrix, elements=1)
    assert torch.equal(pieces, decode(kind, packed).half())


# What does not fit is refused: (packer, change of tensors or config, message)
BREAKAGES: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("fp8", lambda t, c: t.update({".weight_scale": torch.ones(3)}), r"weight_scale has the shape \[3\]"),
    ("fp8", lambda t, c: t.update({".weight_scale": torch.ones(4, 3)}), r"weight_scale has the shape \[4, 3\]"),
    ("fp8", lambda t, c: t.update({".weight_scale": torch.full((64, 3), 255).byte()}), "a scale is NaN"),
    ("nvfp4", lambda t, c: t.update({".weight_scale": t[".weight_scale"][:, :3]}), r"expected \[64, 6\]"),
    ("nvfp4", lambda t, c: t.update({".weight_scale_2": torch.ones(2)}), "weight_scale_2 is not one number"),
    ("nvfp4_packed", lambda t, c: t.update({".weight_global_scale": torch.ones(2)}), "global_scale is not one number"),
    ("aqlm", lambda t, c: t.update({".codes": t[".codes"].int()}), "codes of 8 bits are stored in 32"),
    ("aqlm", lambda t, c: t.update({".codebooks": t[".codebooks"][:1]}), "codes of 2 codebooks, but codebooks has 1"),
    ("aqlm", lambda t, c: t.update({".codebooks": t[".codebooks"][:, :99]}), "99 vectors, expected a power of two"),
    ("aqlm", lambda t, c: t.update({".scales": t[".scales"][1:]}), r"scales has the shape \[63, 1, 1, 1\]"),
    ("aqlm", lambda t, c: c.update(in_group_size=4), "in_group_size 8, but config.json says 4"),
    ("vptq", lambda t, c: t.pop(".perm"), "no tensor '.perm', which config.json gives it"),
    ("vptq", lambda t, c: t.pop(".res_centroids.weight"), "no tensor '.res_centroids.weight'"),
    ("vptq", lambda t, c: c["layer"].update(enable_norm=False), "a tensor '.weight_bias', which config.json does not"),
    ("vptq", lambda t, c: t.update({".perm": torch.zeros(96).short()}), "perm is not a permutation"),
    ("vptq", lambda t, c: t.update({".indices": t[".indices"][..., 1:]}), r"indices has the shape \[1, 8, 17\]"),
    ("vptq", lambda t, c: c["layer"].update(vector_quant_dim="in"), "vector_quant_dim 'in' is not decoded"),
    ("vptq", lambda t, c: c["layer"].update(num_centroids=[-1, 24]), "24 centroids, expected a power of two"),
    ("vptq", lambda t, c: c["layer"].update(group_size=95), "96 inputs, but 0 outliers and 1 groups of 95"),
    ("vptq", lambda t, c: c.update(layer=None), "config.json has no parameters for it"),
    ("anyprecision", lambda t, c: t.pop(".lut4"), "no table lut4"),
    ("anyprecision", lambda t, c: t.update({".lut7": t[".lut6"]}), "lut7, but config.json says precisions 3 to 6"),
    ("anyprecision", lambda t, c: t.update({".qweight": t[".qweight"][1:]}), "5 planes, but config.json"),
    ("anyprecision", lambda t, c: c.update(group_count=2), "group_count 2 is not known"),
    ("hqq", lambda t, c: t.update({".packing": torch.tensor(list(b"5bit_u8")).byte()}), "packing '5bit_u8' is not"),
    ("hqq", lambda t, c: t.update({".nbits": torch.tensor(2)}), "nbits is 2, but packing 4bit_u8"),
    ("hqq", lambda t, c: t.update({".quant_zero": torch.tensor(1)}), "zeros are quantized themselves"),
    ("hqq", lambda t, c: t.update({".zero": t[".zero"][1:]}), r"zero has the shape \[383, 1\]"),
    ("hqq", lambda t, c: t.update({".shape": torch.tensor([64, 64])}), r"W_q has the shape \[192, 16\]"),
    ("qtip", lambda t, c: t.pop(".tlut"), "no tensor '.tlut'"),
    ("qtip", lambda t, c: t.update({".SU": t[".SU"][:80]}), r"trellis has the shape \[24, 64\], expected \[20, 64\]"),
    ("qtip", lambda t, c: t.update({".rcp": torch.tensor(3)}), "rcp is 3"),
    ("qtip", lambda t, c: c.update(decode_mode="other"), "decode_mode 'other'"),
    ("qtip", lambda t, c: c.update(K=3), r"expected \[24, 48\]"),
    ("qtip", lambda t, c: c.update(decode_mode="1mad"), "decode_mode 1mad with V 2"),
    ("qtip", lambda t, c: c.pop("L"), "has L None"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BREAKAGES, ids=[f"{b[0]}-{i}" for i, b in enumerate(BREAKAGES)])
def test_tensors_that_do_not_fit_are_refused(kind: str, change: Callable[[Any, Any], Any], message: str) -> None:
    packed = getattr(packers, kind)(1, 64, 96)
    change(packed.tensors, packed.config)
    with pytest.raises(ValueError, match=message):
        decode(kind, packed)
