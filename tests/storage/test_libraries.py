"""bitsandbytes, ModelOpt, AWQ, GPTQ: headers that the libraries wrote, against figures by hand.

fixtures/make_headers.py recorded the headers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from lmeval_ext.storage import inspect
from tests.storage.builders import FIXTURES, LLAMA, write_checkpoint, write_raw

RECORDS: dict[str, Any] = json.loads((FIXTURES / "library_headers.json").read_text())
# (out, in) of q, k, v, o, gate, up, down: hidden 128, inner 256, two of four heads for keys and values.
SHAPES = {
    "q": (128, 128),
    "k": (64, 128),
    "v": (64, 128),
    "o": (128, 128),
    "gate": (256, 128),
    "up": (256, 128),
    "down": (128, 256),
}
ELEMENTS = sum(out * inputs for out, inputs in SHAPES.values())
GROUP = 32


def rebuild(folder: Path, name: str, drop: tuple[str, ...] = ()) -> Path:
    record = RECORDS[name]
    size = max(entry["data_offsets"][1] for key, entry in record["header"].items() if key != "__metadata__")
    write_raw(folder / "model.safetensors", record["header"], size)
    for file, content in record["files"].items():
        if file not in drop:
            (folder / file).write_text(json.dumps(content))
    return folder


def gptq(bits: int) -> Callable[[int, int], int]:
    """Return the bits: codes, packed zero points and f16 scales per group, one int32 group index per input."""
    return lambda out, i: out * i * bits + i // GROUP * out * (bits + 16) + 32 * i


# (name, family, scheme, bits of one matrix without bitsandbytes' JSON tensor)
CASES: list[tuple[str, str, str, Callable[[int, int], int]]] = [
    ("bnb-nf4", "bitsandbytes", "nf4", lambda o, i: o * i * 4 + o * i // 64 * 32 + 16 * 32),
    ("bnb-nf4-dq", "bitsandbytes", "nf4-dq",
     lambda o, i: o * i * 4 + o * i // 64 * 8 + ceil(o * i / 64 / 256) * 32 + (16 + 256) * 32),
    ("bnb-fp4-bf16", "bitsandbytes", "fp4", lambda o, i: o * i * 4 + o * i // 64 * 32 + 16 * 32),
    ("bnb-int8", "bitsandbytes", "int8", lambda o, i: o * i * 8 + o * 32 + 8),
    ("modelopt-nvfp4", "NVFP4", "nvfp4", lambda o, i: o * i * 4 + o * i // 16 * 8 + 2 * 32),
    ("modelopt-fp8", "FP8", "fp8", lambda o, i: o * i * 8 + 2 * 32),
    ("modelopt-mxfp4", "MXFP4", "mxfp4a4", lambda o, i: o * i * 4 + o * i // 32 * 8),
    ("modelopt-int4-awq", "INT", "w4a16-awq", lambda o, i: o * i * 4 + o * i // 128 * 32),
    ("modelopt-w4a8-awq", "INT", "w4a8-awq", lambda o, i: o * i * 4 + o * i // 128 * 32 + 2 * 32),
    ("awq", "AWQ", "awq-w4-g32", lambda o, i: o * i * 4 + i // GROUP * o * (4 + 16)),
    *((f"gptq-{bits}", "GPTQ", f"gptq-w{bits}-g32", gptq(bits)) for bits in (2, 3, 4, 8)),
    ("gptq-4-act-order", "GPTQ", "gptq-w4-g32", gptq(4)),
]  # fmt: skip


# AWQ's activation scales of o_proj and down_proj, bf16, one per input; the others are folded into norms and weights.
PRE_QUANT_SCALES = {"modelopt-int4-awq": 16 * (128 + 256), "modelopt-w4a8-awq": 16 * (128 + 256)}


@pytest.mark.parametrize(("name", "family", "scheme", "bits"), CASES, ids=[case[0] for case in CASES])
def test_library_header_matches_figures_by_hand(
    tmp_path: Path, name: str, family: str, scheme: str, bits: Callable[[int, int], int]
) -> None:
    header = RECORDS[name]["header"]
    side = PRE_QUANT_SCALES.get(name, 0) + sum(
        8 * entry["shape"][0] for key, entry in header.items() if ".quant_state." in key
    )
    info = inspect(rebuild(tmp_path, name))
    assert info.layer_bits == sum(bits(out, inputs) for out, inputs in SHAPES.values()) + side
    assert info.layer_elements == ELEMENTS
    assert info.layer_bpw == info.layer_bits / ELEMENTS
    assert (info.family, info.scheme, info.head_bpw, info.notes) == (family, scheme, 16, ())
    assert info.elements == ELEMENTS + 2 * 256 * 128 + 3 * 128


def test_every_fixture_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(RECORDS)


def test_modelopt_scheme_from_hf_quant_config(tmp_path: Path) -> None:
    """Older exports have no quantization_config in config.json, only hf_quant_config.json."""
    folder = rebuild(tmp_path, "modelopt-nvfp4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).scheme == "nvfp4"


def test_gptq_scheme_from_quantize_config(tmp_path: Path) -> None:
    folder = rebuild(tmp_path, "gptq-4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP}))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).scheme == "gptq-w4-g32"


def test_tensors_without_config_give_figures_but_no_scheme(tmp_path: Path) -> None:
    known = inspect(rebuild(tmp_path / "known", "awq"))
    info = inspect(rebuild(tmp_path / "bare", "awq", drop=("config.json",)))
    assert (info.layer_bpw, info.head_bpw, info.family) == (known.layer_bpw, known.head_bpw, "AWQ")
    assert info.scheme is None
    assert any("scheme is null" in note for note in info.notes)


AWQ = {".qweight": ("I32", (64, 4)), ".qzeros": ("I32", (2, 4)), ".scales": ("F16", (2, 32))}
GPTQ = {".qweight": ("I32", (8, 32)), ".qzeros": ("I32", (2, 4)), ".scales": ("F16", (2, 32)), ".g_idx": ("I32", (64,))}


@pytest.mark.parametrize(
    ("layout", "suffix", "shape"),
    [
        (AWQ, ".qweight", (63, 4)),
        (AWQ, ".scales", (2, 40)),
        (AWQ, ".qzeros", (3, 4)),
        (GPTQ, ".g_idx", (65,)),
        (GPTQ, ".qzeros", (2, 5)),
        (GPTQ, ".scales", (3, 32)),
    ],
)
def test_contradicting_parts_give_null(
    tmp_path: Path, layout: dict[str, Any], suffix: str, shape: tuple[int, ...]
) -> None:
    parts = {**layout, suffix: (layout[suffix][0], shape)}
    spec = {f"model.layers.0.mlp.up_proj{key}": value for key, value in parts.items()}
    spec["lm_head.weight"] = ("F16", (8, 64))
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert (info.layer_bpw, info.vram_gb, info.file_bpw) == (None, None, None)
    assert any("up_proj" in note for note in info.notes)


@pytest.mark.parametrize("layout", [AWQ, GPTQ])
def test_consistent_parts_are_read(tmp_path: Path, layout: dict[str, Any]) -> None:
    spec = {f"model.layers.0.mlp.up_proj{key}": value for key, value in layout.items()}
    info = inspect(write_checkpoint(tmp_path, {**spec, "lm_head.weight": ("F16", (8, 64))}, LLAMA))
    assert info.layer_elements == 64 * 32


def test_gpt_oss_experts_match_figures_by_hand(tmp_path: Path) -> None:
    """transformers' integrations/mxfp4.py: 3-D experts, 32 codes in 16 bytes and one exponent byte per block."""
    base = "model.layers.0.mlp.experts.gate_up_proj"
    spec = {
        f"{base}_blocks": ("U8", (4, 64, 3, 16)),
        f"{base}_scales": ("U8", (4, 64, 3)),
        f"{base}_bias": ("BF16", (4, 64)),
        "model.layers.0.mlp.router.weight": ("BF16", (4, 96)),
        "lm_head.weight": ("BF16", (8, 96)),
    }
    config = {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}
    info = inspect(write_checkpoint(tmp_path, spec, config))
    assert (info.layer_bpw, info.layer_elements) == (4.25, 4 * 64 * 96)
    assert (info.family, info.scheme) == ("MXFP4", "mxfp4")
    assert [part.kind for part in info.excluded] == ["other", "router"]


def test_fine_grained_fp8_matches_figures_by_hand(tmp_path: Path) -> None:
    """transformers' integrations/finegrained_fp8.py: one f32 scale per 128 x 128 block; experts fused in 5.x."""
    spec = {
        "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (256, 384)),
        "model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", (2, 3)),
        "model.layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", (4, 128, 128)),
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv": ("F32", (4, 1, 1)),
        "lm_head.weight": ("BF16", (8, 96)),
    }
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    info = inspect(write_checkpoint(tmp_path, spec, config))
    assert info.layer_elements == 256 * 384 + 4 * 128 * 128
    assert info.layer_bits == 8 * info.layer_elements + 32 * (2 * 3 + 4)
    assert (info.family, info.scheme) == ("FP8", "fp8-block")


@pytest.mark.parametrize(
    ("method", "family"),
    [("quark", "Quark"), ("spqr", "SpQR"), ("eetq", "EETQ"), ("from-the-future", "from-the-future")],
)
def test_unsupported_method_gives_null_and_a_note(tmp_path: Path, method: str, family: str) -> None:
    spec = {"model.layers.0.mlp.up_proj.codes": ("I16", (8, 8)), "lm_head.weight": ("F16", (8, 64))}
    info = inspect(write_checkpoint(tmp_path, spec, {**LLAMA, "quantization_config": {"quant_method": method}}))
    assert (info.layer_bpw, info.head_bpw, info.vram_gb, info.file_bpw, info.scheme) == (None,) * 5
    assert info.family == family
    assert info.weight_bytes == 2 * 64 + 2 * 8 * 64
    assert any(method in note for note in info.notes)


@pytest.mark.parametrize(
    "tensors",
    [
        {".codes": ("I16", (8, 8)), ".codebooks": ("F16", (1, 256, 1, 8))},
        {".W_q": ("U8", (8, 8))},
        {".compressed": ("F16", (256,)), ".bitmask": ("U8", (8, 8))},
        {".weight": ("U8", (8, 8)), ".weight_scale": ("F32", (3, 3))},
        {".weight_packed": ("I32", (8, 8))},
        {".w13": ("F8_E4M3", (4, 8, 8)), ".w13_scale": ("F32", (4, 8))},
        {".qweight": ("U8", (8, 8))},
    ],
)
def test_unknown_packing_gives_null(tmp_path: Path, tensors: dict[str, Any]) -> None:
    spec = {f"model.layers.0.mlp.up_proj{key}": value for key, value in tensors.items()}
    info = inspect(write_checkpoint(tmp_path, {**spec, "lm_head.weight": ("F16", (8, 64))}, LLAMA))
    assert (info.layer_bpw, info.vram_gb, info.head_bpw) == (None, None, 16)
    assert any("up_proj" in note for note in info.notes)


def test_installed_bitsandbytes_writes_the_recorded_layout(tmp_path: Path) -> None:
    """Compares the recorded header with a new one; needs bitsandbytes, which is not a dependency of this project."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: only its recorded headers were checked")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")
    recorded = inspect(rebuild(tmp_path / "recorded", "bnb-nf4"))
    live = inspect(tmp_path / "nf4")
    assert (live.layer_bits, live.layer_elements) == (recorded.layer_bits, recorded.layer_elements)
