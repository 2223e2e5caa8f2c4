"""AQLM, VPTQ, QTIP, QuIP#, Any-Precision, HQQ, BitNet, quanto, torchao, mxfp8: headers against arithmetic by hand.

Each checkpoint is a Llama of two layers with one quantized matrix of 96 x 64 (out x in) and one of 64 x 96 each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmeval_ext.storage import inspect
from tests.storage.builders import LLAMA, write_checkpoint

UP, DOWN = (96, 64), (64, 96)
NAMES = {f"model.layers.{layer}.mlp.{name}": shape for layer in (0, 1) for name, shape in
         (("up_proj", UP), ("down_proj", DOWN))}  # fmt: skip
ELEMENTS = 4 * 96 * 64
Matrix = Callable[[int, int], dict[str, tuple[str, tuple[int, ...]]]]


def checkpoint(folder: Path, matrix: Matrix, config: dict[str, Any]) -> Path:
    spec: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F16", (128, 64)), "lm_head.weight": ("F16", (128, 64)),
        "model.norm.weight": ("F16", (64,)),
    }  # fmt: skip
    for name, (out, size) in NAMES.items():
        spec |= {name + suffix: tensor for suffix, tensor in matrix(out, size).items()}
    return write_checkpoint(folder, spec, LLAMA | config)


def method(name: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


def aqlm(books: int, bits: int, height: int = 1, width: int = 8) -> Matrix:
    kind = "I8" if bits <= 8 else "I16"
    return lambda out, size: {
        ".codes": (kind, (out // height, size // width, books)),
        ".codebooks": ("F16", (books, 2**bits, height, width)), ".scales": ("F16", (out // height, 1, 1, 1)),
    }  # fmt: skip


def aqlm_bits(books: int, bits: int, height: int = 1, width: int = 8) -> Callable[[int, int], int]:
    stored = 8 if bits <= 8 else 16
    return lambda out, size: (
        out * size * books * stored // (height * width) + 16 * books * 2**bits * height * width + 16 * out // height
    )


def aqlm_config(books: int, bits: int, height: int = 1, width: int = 8) -> dict[str, Any]:
    return method(
        "aqlm", nbits_per_codebook=bits, num_codebooks=books, in_group_size=width, out_group_size=height,
        linear_weights_not_to_quantize=["lm_head.weight"],
    )  # fmt: skip


def vptq(vector: int, main: int, residual: int, outliers: int = 0) -> Matrix:
    width = (main.bit_length() - 1) + (residual.bit_length() - 1 if residual else 0)

    def tensors(out: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            ".indices": ("I32", (1, ceil(out / vector), ceil((size - outliers) * width / 32))),
            ".centroids.weight": ("F16", (1, main * vector)), ".perm": ("I16", (size,)),
            ".weight_scale": ("F16", (size,)), ".weight_bias": ("F16", (size,)),
        }  # fmt: skip
        if residual:
            parts[".res_centroids.weight"] = ("F16", (1, residual * vector))
        if outliers:
            parts[".outlier_indices"] = ("I16", (1, out // 4, outliers))
            parts[".outlier_centroids.weight"] = ("F16", (1, 256 * 4))
        return parts

    return tensors


def vptq_layer(out: int, size: int, vector: int, main: int, residual: int) -> dict[str, Any]:
    return {"in_features": size, "out_features": out, "vector_lens": [-1, vector], "num_centroids": [-1, main],
            "num_res_centroids": [-1, residual or -1]}  # fmt: skip


def vptq_config(vector: int, main: int, residual: int) -> dict[str, Any]:
    layers = {name: vptq_layer(*shape, vector, main, residual) for name, shape in NAMES.items()}
    return method("vptq", config_for_layers=layers)


QTIP = {"L": 16, "K": 3, "V": 2, "td_x": 16, "td_y": 16, "decode_mode": "quantlut_sym", "tlut_bits": 9}


def qtip(out: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {".trellis": ("I16", (out * size // 256, 48)), ".SU": ("F16", (size,)), ".SV": ("F32", (out,)),
            ".tlut": ("F16", (512, 2)), ".rcp": ("I64", ()), ".tp_rank": ("I64", ())}  # fmt: skip


def any_precision(out: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    tables: dict[str, tuple[str, tuple[int, ...]]] = {f".lut{bits}": ("F16", (out, 2**bits)) for bits in range(3, 9)}
    return tables | {".qweight": ("I32", (8, out, size // 32))}


ANYPREC = {"anyprec": {"seed_precision": 3, "parent_precision": 8, "group_count": 1, "arch_config": {}}}

# name: (tensors of a matrix, config, family, scheme, bits of a matrix of out x in)
CASES: dict[str, tuple[Matrix, dict[str, Any], str, str, Callable[[int, int], int]]] = {
    "aqlm-2x8": (aqlm(2, 8), aqlm_config(2, 8), "AQLM", "aqlm-2x8-g8", aqlm_bits(2, 8)),
    "aqlm-1x16": (aqlm(1, 16, 1, 16), aqlm_config(1, 16, 1, 16), "AQLM", "aqlm-1x16-g16", aqlm_bits(1, 16, 1, 16)),
    "aqlm-blocks": (aqlm(1, 6, 2, 4), aqlm_config(1, 6, 2, 4), "AQLM", "aqlm-1x6-g4x2", aqlm_bits(1, 6, 2, 4)),
    "vptq": (vptq(8, 4096, 256), vptq_config(8, 4096, 256), "VPTQ", "vptq-v8-k4096-256",
             lambda o, i: o // 8 * ceil(i * 20 / 32) * 32 + 16 * 8 * (4096 + 256) + 48 * i),
    "vptq-padded": (vptq(10, 1024, 0, 16), vptq_config(10, 1024, 0), "VPTQ", "vptq-v10-k1024-0",
                    lambda o, i: ceil(o / 10) * ceil((i - 16) * 10 / 32) * 32 + 16 * 10 * 1024 + 48 * i
                    + o // 4 * 16 * 16 + 16 * 1024),
    "qtip": (qtip, {"quip_params": QTIP}, "QTIP", "qtip-3bit-quantlut_sym",
             lambda o, i: 3 * o * i + 16 * 2**9 * 2 + 16 * i + 32 * o + 128),
    "quip": (lambda o, i: {".Qidxs": ("I64", (o, i // 32)), ".SU": ("F16", (i,)), ".SV": ("F16", (o,)),
                           ".Wscale": ("F32", ()), ".codebook_id": ("I64", ())},
             {"quip_params": {"codebook": "E8P12", "fused": False}}, "QuIP#", "quip-e8p12",
             lambda o, i: 2 * o * i + 16 * (o + i) + 32 + 64),
    "any-precision": (any_precision, ANYPREC, "Any-Precision", "anyprec-3to8bit",
                      lambda o, i: 8 * o * i + sum(16 * 2**bits * o for bits in range(3, 9))),
    "bitnet": (lambda o, i: {".weight": ("U8", (o // 4, i)), ".weight_scale": ("BF16", (1,))}, method("bitnet"),
               "BitNet", "bitnet-b1.58", lambda o, i: 2 * o * i + 16),
    "quanto-int8": (lambda o, i: {".weight._data": ("I8", (o, i)), ".weight._scale": ("F16", (o, 1)),
                                  ".input_scale": ("F16", ()), ".output_scale": ("F16", ())},
                    {}, "Quanto", "quanto-int8", lambda o, i: 8 * o * i + 16 * o + 32),
    "quanto-int4": (lambda o, i: {".weight._data._data": ("U8", (o * i // 32 // 2, 32)),
                                  ".weight._scale": ("F16", (o * i // 32, 1)),
                                  ".weight._shift": ("F16", (o * i // 32, 1))},
                    {}, "Quanto", "quanto-int4", lambda o, i: 4 * o * i + 32 * o * i // 32),
    "quanto-int2": (lambda o, i: {".weight._data._data": ("U8", (o * i // 32 // 4, 32)),
                                  ".weight._scale": ("F16", (o * i // 32, 1)),
                                  ".weight._shift": ("F16", (o * i // 32, 1))},
                    {}, "Quanto", "quanto-int2", lambda o, i: 2 * o * i + 32 * o * i // 32),
    "torchao": (lambda o, i: {"._weight_qdata": ("I8", (o, i)), "._weight_scale": ("F16", (o, 1))},
                method("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}}),
                "torchao", "torchao-Int8WeightOnly", lambda o, i: 8 * o * i + 16 * o),
    "autofp8": (lambda o, i: {".weight": ("F8_E4M3", (o, i)), ".weight_scale": ("F16", (1,)),
                              ".input_scale": ("F16", (1,))},
                method("fp8", activation_scheme="static"), "FP8", "fp8", lambda o, i: 8 * o * i + 32),
    "fp8-block": (lambda o, i: {".weight": ("F8_E4M3", (o, i)), ".weight_scale_inv": ("F32", (o // 32, i // 32))},
                  method("fp8", weight_block_size=[32, 32]), "FP8", "fp8-block",
                  lambda o, i: 8 * o * i + 32 * (o // 32) * (i // 32)),
    "mxfp8": (lambda o, i: {".weight": ("F8_E4M3", (o, i)), ".weight_scale_inv": ("U8", (o, i // 32))},
              method("mxfp8", weight_block_size=[1, 32]), "FP8", "mxfp8", lambda o, i: 8 * o * i + 8 * o * i // 32),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_header_matches_figures_by_hand(tmp_path: Path, name: str) -> None:
    matrix, config, family, scheme, bits = CASES[name]
    folder = checkpoint(tmp_path, matrix, config)
    if name.startswith("quanto"):
        modules = {matrix: {"weights": f"q{name.removeprefix('quanto-')}", "activations": "none"} for matrix in NAMES}
        (folder / "quanto_qmap.json").write_text(json.dumps(modules))
    info = inspect(folder)
    assert info.layer_bits == sum(bits(*shape) for shape in NAMES.values())
    assert info.layer_elements == ELEMENTS
    assert (info.family, info.scheme, info.head_bpw) == (family, scheme, 16)
    assert info.elements == ELEMENTS + 2 * 128 * 64 + 64
    assert info.vram_gb == (info.layer_bits + 128 * 64 * 16) / 8 / 1024**3


@pytest.mark.parametrize(("bits", "parts", "kind"), [(8, 1, "u1"), (4, 2, "u1"), (3, 10, "i4"), (2, 4, "u1")])
def test_hqq_shape_is_read_from_its_tensor(tmp_path: Path, bits: int, parts: int, kind: str) -> None:
    tensors = {"model.embed_tokens.weight": np.zeros((128, 64), "f2"), "lm_head.weight": np.zeros((128, 64), "f2")}
    group, counted = 48, 0
    for name, (out, size) in NAMES.items():
        groups = out * size // group
        sides = {".scale": np.zeros((groups, 1), "f2"), ".zero": np.zeros((groups, 1), "f2"),
                 ".shape": np.array([out, size]), ".nbits": np.array(bits, "i4"), ".axis": np.array(1, "i4"),
                 ".packing": np.zeros(7, "u1")}  # fmt: skip
        sides[".W_q"] = np.zeros((ceil(groups / parts), group), kind)
        tensors |= {name + suffix: tensor for suffix, tensor in sides.items()}
        counted += ceil(groups / parts) * group * 8 * int(kind[1]) + 32 * groups + 128 + 64 + 56
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"weight_quant_params": {"nbits": bits, "group_size": group}}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | method("hqq", quant_config=settings)))
    info = inspect(tmp_path)
    assert (info.layer_bits, info.layer_elements) == (counted, ELEMENTS)
    assert (info.family, info.scheme) == ("HQQ", f"hqq-w{bits}-g48")


@pytest.mark.parametrize("precision", [3, 5, 8])
def test_one_precision_of_several_is_counted(tmp_path: Path, precision: int) -> None:
    """B planes and one table: B + 16 · 2^B / in bits a weight."""
    info = inspect(checkpoint(tmp_path, any_precision, ANYPREC), precision=precision)
    expected = sum(out * size * (precision + 16 * 2**precision / size) for out, size in NAMES.values())
    assert info.layer_bits == expected
    assert info.scheme == f"anyprec-{precision}bit"
    assert info.notes == (f"sizes are of the model at {precision} bits, out of a file that holds it at 3 to 8 bits",)


def without(matrix: Matrix, suffix: str) -> Matrix:
    return lambda out, size: {name: tensor for name, tensor in matrix(out, size).items() if name != suffix}


def changed(matrix: Matrix, suffix: str, dtype: str, shape: tuple[int, ...]) -> Matrix:
    return lambda out, size: matrix(out, size) | {suffix: (dtype, shape)}


TORCHAO = method("torchao", quant_type={"default": {"_type": "Int4WeightOnlyConfig"}})
DOUBTS: dict[str, tuple[Matrix, dict[str, Any]]] = {
    "aqlm without scales": (without(aqlm(2, 8), ".scales"), aqlm_config(2, 8)),
    "aqlm, other codebooks": (changed(aqlm(2, 8), ".codebooks", "F16", (3, 256, 1, 8)), aqlm_config(2, 8)),
    "vptq without parameters": (vptq(8, 4096, 256), method("vptq", config_for_layers={})),
    "vptq, other vectors": (vptq(8, 4096, 256), vptq_config(6, 4096, 256)),
    "qtip, other bits": (qtip, {"quip_params": QTIP | {"K": 4}}),
    "qtip without signs": (without(qtip, ".SU"), {"quip_params": QTIP}),
    "any-precision, a plane too few": (changed(any_precision, ".qweight", "I32", (9, 96, 2)), ANYPREC),
    "packed torchao": (
        lambda o, i: {"._weight_qdata": ("I8", (o, i // 2)), "._weight_scale": ("F16", (o, 1))}, TORCHAO,
    ),
    "quanto without shifts": (
        lambda o, i: {".weight._data._data": ("U8", (o, 32)), ".weight._scale": ("F16", (o, 1))}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_doubt_gives_no_figure(tmp_path: Path, name: str) -> None:
    info = inspect(checkpoint(tmp_path, *DOUBTS[name]))
    assert (info.layer_bpw, info.vram_gb) == (None, None)
    assert info.notes


def test_vptq_finds_parameters_by_the_last_part_of_a_name(tmp_path: Path) -> None:
    shared = {"up_proj": vptq_layer(*UP, 8, 256, 0), "down_proj": vptq_layer(*DOWN, 8, 256, 0)}
    info = inspect(checkpoint(tmp_path, vptq(8, 256, 0), method("vptq", shared_layer_config=shared)))
    assert info.layer_elements == ELEMENTS
    assert info.scheme == "vptq-v8-k256-0"
