"""compressed-tensors: checkpoints that the library itself compressed and saved, against figures by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from transformers import LlamaConfig, LlamaForCausalLM

from lmeval_ext.storage import inspect
from tests.storage.builders import LLAMA, write_checkpoint

pytestmark = pytest.mark.engine

HIDDEN, INNER, LAYERS, VOCAB = 96, 160, 2, 256
KV = HIDDEN // 2
# (out, in) of the seven matrices of a layer: q, k, v, o, gate, up, down.
SHAPES = [
    (HIDDEN, HIDDEN),
    (KV, HIDDEN),
    (KV, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
]
ELEMENTS = LAYERS * sum(out * inputs for out, inputs in SHAPES)


def save(folder: Path, groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """Save a tiny random Llama with a bf16 embedding, compressed by the library."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for name, parameter in model.named_parameters():
        if "scale" in name:
            parameter.data.fill_(1)
        elif "zero_point" in name:
            parameter.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def preset(name: str, group_size: int | None = None, targets: str = "Linear") -> Any:
    if name.startswith("channel"):  # no preset: weight-only integers, one scale per row
        weights = QuantizationArgs(num_bits=int(name.removeprefix("channel")), strategy="channel")
        return QuantizationScheme(targets=[targets], weights=weights)
    scheme = preset_name_to_scheme(name, [targets])
    if group_size:
        scheme.weights.group_size = group_size
    return scheme


def packed_int4(out: int, inputs: int, group: int, asymmetric: bool) -> int:
    """Return the bits of a matrix: int32 words of 8 codes, a bf16 scale per group, two int64 of shape, zero points."""
    words, groups = out * ceil(inputs / 8), out * (inputs // group)
    return 32 * words + 16 * groups + 2 * 64 + (32 * ceil(out / 8) * (inputs // group) if asymmetric else 0)


Bits = Callable[[int, int], int]
CASES: list[tuple[str, int | None, str, str, Bits]] = [
    ("NVFP4A16", None, "NVFP4", "nvfp4a16", lambda o, i: o * i * 4 + o * i // 16 * 8 + 32),
    ("NVFP4", None, "NVFP4", "nvfp4", lambda o, i: o * i * 4 + o * i // 16 * 8 + 64),
    ("MXFP4A16", None, "MXFP4", "mxfp4a16", lambda o, i: o * i * 4 + o * i // 32 * 8),
    ("MXFP4", None, "MXFP4", "mxfp4a4", lambda o, i: o * i * 4 + o * i // 32 * 8),
    ("W4A16", 32, "INT", "w4a16-g32", lambda o, i: packed_int4(o, i, 32, False)),
    ("W4A16_ASYM", 32, "INT", "w4a16-g32-asym", lambda o, i: packed_int4(o, i, 32, True)),
    ("channel8", None, "INT", "w8a16", lambda o, i: o * i * 8 + 16 * o + 2 * 64),
    ("W8A8", None, "INT", "w8a8-int8", lambda o, i: o * i * 8 + 16 * o),
    ("W4A8", 32, "INT", "w4a8-g32", lambda o, i: o * i * 8 + 16 * o * i // 32),
    ("FP8", None, "FP8", "fp8", lambda o, i: o * i * 8 + 16 + 16),
    ("FP8_DYNAMIC", None, "FP8", "fp8-dynamic", lambda o, i: o * i * 8 + 16 * o),
    ("FP8_BLOCK", None, "FP8", "fp8-block", lambda o, i: o * i * 8 + 16 * ceil(o / 128) * ceil(i / 128)),
    ("MXFP8", None, "FP8", "mxfp8", lambda o, i: o * i * 8 + 8 * o * i // 32),
]


@pytest.mark.parametrize(("name", "group", "family", "scheme", "bits"), CASES, ids=[case[0] for case in CASES])
def test_preset_matches_figures_by_hand(
    tmp_path: Path, name: str, group: int | None, family: str, scheme: str, bits: Bits
) -> None:
    info = inspect(save(tmp_path, {"group_0": preset(name, group)}))
    assert info.layer_bits == LAYERS * sum(bits(out, inputs) for out, inputs in SHAPES)
    assert info.layer_elements == ELEMENTS
    assert info.layer_bpw == info.layer_bits / ELEMENTS
    assert info.head_bpw == 16
    assert (info.family, info.scheme, info.tied, info.notes) == (family, scheme, False, ())
    norms = (2 * LAYERS + 1) * HIDDEN
    assert info.elements == ELEMENTS + 2 * VOCAB * HIDDEN + norms
    assert 8 * info.weight_bytes == info.layer_bits + 2 * 16 * VOCAB * HIDDEN + 16 * norms


def test_partly_filled_last_word_counts_logical_width(tmp_path: Path) -> None:
    """3-bit codes: 10 per int32, so 96 inputs take 10 words; only weight_shape gives the width of 96, not 100.

    From compressed-tensors 0.20 on, they lie without gaps: 9 words.
    """
    info = inspect(save(tmp_path, {"group_0": preset("channel3")}))
    assert info.layer_elements == ELEMENTS
    without_gaps = tuple(map(int, version("compressed-tensors").split(".")[:2])) >= (0, 20)
    words = [ceil(3 * i / 32) if without_gaps else ceil(i / 10) for _, i in SHAPES]
    rows = zip(words, SHAPES, strict=True)
    assert info.layer_bits == LAYERS * sum(32 * out * row + 16 * out + 128 for row, (out, _) in rows)
    assert info.scheme == "w3a16"


def test_mixed_config_groups_are_summed(tmp_path: Path) -> None:
    groups = {
        "group_0": preset("NVFP4", targets=r"re:.*mlp\..*_proj$"),
        "group_1": preset("FP8_DYNAMIC", targets=r"re:.*self_attn\.(q|k)_proj$"),
    }
    info = inspect(save(tmp_path, groups))
    nvfp4 = sum(o * i * 4 + o * i // 16 * 8 + 64 for o, i in SHAPES[4:])
    fp8 = sum(o * i * 8 + 16 * o for o, i in SHAPES[:2])
    dense = sum(o * i * 16 for o, i in SHAPES[2:4])
    assert info.layer_bits == LAYERS * (nvfp4 + fp8 + dense)
    assert info.layer_elements == ELEMENTS
    assert (info.family, info.scheme) == ("NVFP4", "fp8-dynamic+nvfp4")


def test_quantized_head_gives_head_bpw(tmp_path: Path) -> None:
    info = inspect(save(tmp_path, {"group_0": preset("NVFP4A16")}, ignore=()))
    assert info.head_bits == VOCAB * HIDDEN * 4 + VOCAB * HIDDEN // 16 * 8 + 32
    assert info.head_elements == VOCAB * HIDDEN


def test_mismatched_scales_give_null_and_the_reason(tmp_path: Path) -> None:
    base = "model.layers.0.mlp.up_proj"
    spec = {
        f"{base}.weight_packed": ("U8", (32, 32)),
        f"{base}.weight_scale": ("F8_E4M3", (32, 3)),
        f"{base}.weight_global_scale": ("F32", (1,)),
        "lm_head.weight": ("BF16", (8, 64)),
    }
    config = {**LLAMA, "quantization_config": {"quant_method": "compressed-tensors"}}
    info = inspect(write_checkpoint(tmp_path, spec, config))
    assert (info.layer_bpw, info.vram_gb, info.file_bpw, info.head_bpw) == (None, None, None, 16)
    assert any(base in note and "[32, 4]" in note for note in info.notes)


def test_impossible_weight_shape_gives_null(tmp_path: Path) -> None:
    """The weight_shape of the sparse file is 0 x 0."""
    base = "model.layers.0.mlp.up_proj"
    spec = {
        f"{base}.weight_packed": ("I32", (32, 8)),
        f"{base}.weight_scale": ("BF16", (32, 2)),
        f"{base}.weight_shape": ("I64", (2,)),
        "lm_head.weight": ("BF16", (8, 64)),
    }
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert info.layer_bpw is None
    assert any("weight_shape says 0 x 0" in note for note in info.notes)


def test_saved_config_is_in_the_packed_format(tmp_path: Path) -> None:
    """Guards the tests above against checkpoints that are not packed."""
    save(tmp_path, {"group_0": preset("NVFP4A16")})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
