"""Kinds of architectures, as header-only checkpoints of two or three layers: which tensors count as what.

Every expected figure is worked out by hand from the shapes. V, H, I: vocabulary, hidden size, inner size.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmeval_ext.storage import StorageError, StorageInfo, inspect
from lmeval_ext.storage.safetensors_header import _compact, _parsed
from tests.storage.builders import header_of, write_checkpoint, write_raw

V, H, I = 128, 64, 96  # noqa: E741
Spec = dict[str, tuple[str, tuple[int, ...]]]
TEXT = {"architectures": ["XForCausalLM"], "num_hidden_layers": 2, "tie_word_embeddings": False}
MULTIMODAL = {**TEXT, "architectures": ["XForConditionalGeneration"], "vision_config": {"hidden_size": 32}}

# Where published checkpoints keep the decoder: token embedding, output matrix, layers.
DECODERS = {
    "Llama": ("model.embed_tokens.weight", "lm_head.weight", "model.layers"),
    "Gemma 3": (
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "language_model.model.layers",
    ),
    "Qwen3-VL": ("model.language_model.embed_tokens.weight", "lm_head.weight", "model.language_model.layers"),
    "Granite-Speech": (
        "language_model.model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "language_model.model.model.layers",
    ),
    "InternVL": (
        "language_model.model.tok_embeddings.weight",
        "language_model.output.weight",
        "language_model.model.layers",
    ),
    "Inkling": ("model.llm.embed.weight", "model.llm.unembed.weight", "model.llm.layers"),
    "Molmo": ("model.transformer.wte.embedding", "model.transformer.ff_out.weight", "model.transformer.blocks"),
    "DeepSeek-V4": ("embed.weight", "head.weight", "layers"),
    "Mistral": ("tok_embeddings.weight", "output.weight", "layers"),
    "OpenELM": ("transformer.token_embeddings.weight", "lm_head.weight", "transformer.layers"),
    "ChatGLM": (
        "transformer.embedding.word_embeddings.weight",
        "transformer.output_layer.weight",
        "transformer.encoder.layers",
    ),
    "Nemotron-H": ("backbone.embeddings.weight", "lm_head.weight", "backbone.layers"),
    "RWKV": ("rwkv.embeddings.weight", "head.weight", "rwkv.blocks"),
    "OPT": ("model.decoder.embed_tokens.weight", "lm_head.weight", "model.decoder.layers"),
    "Pythia": ("gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.layers"),
    "GPT-2": ("transformer.wte.weight", "lm_head.weight", "transformer.h"),
    "CPM-Ant": ("cpmant.input_embedding.weight", "lm_head.weight", "cpmant.encoder.layers"),
}


def decoder(name: str = "Llama") -> Spec:
    """Return a decoder of two layers: one matrix of I x H and a norm in each, the embedding and the head."""
    embedding, head, layers = DECODERS[name]
    spec: Spec = {embedding: ("BF16", (V, H)), head: ("BF16", (V, H))}
    for number in range(2):
        spec[f"{layers}.{number}.mlp.up_proj.weight"] = ("BF16", (I, H))
        spec[f"{layers}.{number}.norm.weight"] = ("BF16", (H,))
    return spec


LAYERS = 2 * I * H  # elements of the layers of `decoder()`


def measure(folder: Path, spec: Spec, config: dict[str, Any]) -> StorageInfo:
    return inspect(write_checkpoint(folder, spec, config))


def kinds(info: StorageInfo) -> dict[str, int | None]:
    return {part.kind: part.elements for part in info.excluded}


def assert_layers_and_head(info: StorageInfo, **more: int) -> None:
    """Check the figures of `decoder()`; more: elements of other kinds."""
    assert (info.layer_elements, info.layer_bits) == (LAYERS, 16 * LAYERS), info.notes
    assert (info.head_elements, info.head_bits) == (V * H, 16 * V * H)
    assert info.vram_gb == (LAYERS + V * H) * 2 / 1024**3
    assert kinds(info) == {"embedding": V * H, "other": 2 * H, **more}


# --- the decoder and what lies outside it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_found_by_its_embedding(tmp_path: Path, name: str) -> None:
    assert_layers_and_head(measure(tmp_path, decoder(name), TEXT))


# Layers, matrices, kernels and scales of towers with names that no table has.
STRANGERS: Spec = {
    "zebra.stripes.0.attention.weight": ("BF16", (32, 32)),
    "zebra.stripes.1.attention.weight": ("BF16", (32, 32)),
    "zebra.stem.weight": ("BF16", (32, 3, 2, 2)),
    "zebra.embeddings.weight": ("BF16", (8, 32)),
    "zebra.scale": ("BF16", (32,)),
    "giraffe.weight": ("BF16", (H, 32)),
}
STRANGE = 2 * 32 * 32 + 32 * 12 + 8 * 32 + 32 + H * 32


@pytest.mark.parametrize("name", [name for name, names in DECODERS.items() if "." in names[2]])
def test_towers_outside_the_decoder_are_recognised_without_their_names(tmp_path: Path, name: str) -> None:
    assert_layers_and_head(measure(tmp_path, {**decoder(name), **STRANGERS}, MULTIMODAL), vision=STRANGE)


@pytest.mark.parametrize("prefix", ["encoder.layers", "projector.qformer.encoder.layer", "sound_encoder.h"])
def test_speech_encoder_with_names_of_a_decoder_is_outside(tmp_path: Path, prefix: str) -> None:
    """Granite-Speech and DeepSeek-VL2 call the layers of their encoders and projectors as decoders do."""
    spec = {**decoder("Gemma 3"), f"{prefix}.0.mlp.up_proj.weight": ("BF16", (256, 256))}
    assert_layers_and_head(measure(tmp_path, spec, MULTIMODAL), vision=256 * 256)


# Parts for other modalities beside the layers, with the names of published checkpoints.
BESIDE = [
    "model.resampler_model.spatial_linear.0.weight",  # ERNIE-4.5-VL
    "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq.weight",  # Molmo
    "model.sam_model.blocks.0.attn.qkv.weight",  # DeepSeek-OCR
    "model.projector.layers.weight",
    "model.merger.mlp.0.linear_1.weight",  # MiniCPM-V 4.6
    "model.vit_merger.mlp.linear_1.weight",
    "model.visual_embeddings_table.weight",  # Ovis 2
    "model.vision_projector.weight",  # HyperCLOVA X
    "model.audio.encoder.weight",  # Inkling
    "model.layerwise_projectors.0.weight",  # Granite 4 Vision
    "model.mm_projector.0.weight",  # LLaVA
    "model.embed_tokens_extend.image_embed.img_projection.0.weight",  # Phi-4-multimodal
    "model.vqmodel.quantize.embedding.weight",  # Chameleon
]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("config", [TEXT, MULTIMODAL], ids=["config of text", "config of images"])
def test_part_beside_the_layers_is_recognised_by_its_words(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    assert_layers_and_head(measure(tmp_path, {**decoder(), name: ("BF16", (32, 32))}, config), vision=32 * 32)


@pytest.mark.parametrize("name", ["model.zebra.stripes.0.weight", "model.encoder.layers.0.mlp.up_proj.weight"])
def test_layers_beside_the_decoders_are_a_tower_if_the_model_takes_images(tmp_path: Path, name: str) -> None:
    assert_layers_and_head(measure(tmp_path, {**decoder(), name: ("BF16", (32, 32))}, MULTIMODAL), vision=32 * 32)


def test_layers_beside_the_decoders_are_a_tower_whatever_lies_elsewhere(tmp_path: Path) -> None:
    towers: Spec = {"model.zebra.0.weight": ("BF16", (32, 32)), "visual.blocks.0.weight": ("BF16", (8, 8))}
    assert_layers_and_head(measure(tmp_path, {**decoder(), **towers}, MULTIMODAL), vision=32 * 32 + 8 * 8)


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({"model.zebra.weight": ("BF16", (32, 32))}, TEXT),
        ({"model.zebra.0.weight": ("BF16", (32, 32))}, TEXT),
        ({"model.zebra.weight": ("BF16", (32, 32)), "visual.blocks.0.weight": ("BF16", (8, 8))}, MULTIMODAL),
    ],
    ids=["a matrix", "layers", "a matrix, and towers elsewhere"],
)
def test_unknown_part_beside_the_layers_gives_null(tmp_path: Path, extra: Spec, config: dict[str, Any]) -> None:
    info = measure(tmp_path, {**decoder(), **extra}, config)
    assert (info.layer_bpw, info.layer_bits, info.layer_elements, info.vram_gb) == (None,) * 4
    assert (info.head_bpw, info.file_bpw) == (16, 16)
    assert any("model.zebra" in note for note in info.notes)


def test_two_stacks_that_fit_alike_give_null(tmp_path: Path) -> None:
    """BLT has three transformers with embeddings and layers of their own."""
    spec = decoder()
    for name, entry in decoder().items():
        if name.startswith("model."):
            spec[name.replace("model.", "model.local_encoder.")] = entry
            spec[name.replace("model.", "model.local_decoder.")] = entry
            del spec[name]
    info = measure(tmp_path, spec, {**TEXT, "num_hidden_layers": None})
    assert (info.layer_bpw, info.layer_bits, info.vram_gb) == (None, None, None)
    assert info.notes


def test_talker_with_layers_of_its_own_is_outside(tmp_path: Path) -> None:
    """Qwen-Omni: the speech model has its own embedding, layers and head."""
    spec = {f"thinker.{name}": entry for name, entry in decoder().items()}
    spec |= {f"talker.{name}": entry for name, entry in decoder().items()}
    info = measure(tmp_path, spec, {**MULTIMODAL, "thinker_config": {"text_config": {"num_hidden_layers": 2}}})
    assert_layers_and_head(info, vision=LAYERS + 2 * V * H + 2 * H)


@pytest.mark.parametrize(
    "name",
    [
        "model.altup_projections.0.weight",  # Gemma 3n
        "model.per_layer_model_projection.weight",
        "model.hc_head_fn",  # DeepSeek-V4
        "model.project_in.weight",  # OPT
        "lm_head.dense.weight",  # RoBERTa
    ],
)
def test_known_part_beside_the_layers_counts_as_a_layer(tmp_path: Path, name: str) -> None:
    info = measure(tmp_path, {**decoder(), name: ("BF16", (H, H))}, TEXT)
    assert (info.layer_elements, info.head_elements) == (LAYERS + H * H, V * H)


def test_both_stacks_of_an_encoder_decoder_are_layers(tmp_path: Path) -> None:
    spec: Spec = {"shared.weight": ("BF16", (V, H)), "lm_head.weight": ("BF16", (V, H))}
    spec |= {f"{side}.block.{n}.layer.0.q.weight": ("BF16", (H, H)) for side in ("encoder", "decoder") for n in (0, 1)}
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "num_hidden_layers": 2}
    info = measure(tmp_path, spec, config)
    assert (info.layer_elements, info.head_elements) == (4 * H * H, V * H)


# --- heads and embeddings -------------------------------------------------------------------------------------------


def test_tied_mamba_uses_its_embedding_as_head(tmp_path: Path) -> None:
    spec: Spec = {
        "backbone.embeddings.weight": ("BF16", (V, H)),
        "backbone.layers.0.mixer.in_proj.weight": ("BF16", (H, H)),
    }
    info = measure(tmp_path, spec, {"architectures": ["Mamba2ForCausalLM"], "tie_word_embeddings": True})
    assert (info.head_bpw, info.head_elements, info.layer_elements, info.tied) == (16, V * H, H * H, True)


@pytest.mark.parametrize("key", ["tie_embeddings", "weight_tying"])
def test_tie_under_another_key_is_read(tmp_path: Path, key: str) -> None:
    spec = decoder()
    del spec["lm_head.weight"]
    assert measure(tmp_path, spec, {key: True}).head_elements == V * H


def test_second_embedding_is_not_a_layer(tmp_path: Path) -> None:
    """Molmo keeps the rows of new tokens apart."""
    spec = {**decoder("Molmo"), "model.transformer.wte.new_embedding": ("BF16", (8, H))}
    info = measure(tmp_path, spec, TEXT)
    assert (info.layer_elements, kinds(info)["embedding"]) == (LAYERS, V * H + 8 * H)


def test_head_with_unknown_name_has_the_shape_of_the_embedding(tmp_path: Path) -> None:
    spec = decoder()
    spec["model.giraffe.weight"] = spec.pop("lm_head.weight")
    assert_layers_and_head(measure(tmp_path, spec, TEXT))


def test_embedding_with_unknown_name_has_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    spec = decoder()
    spec["model.giraffe.weight"] = spec.pop("model.embed_tokens.weight")
    assert_layers_and_head(measure(tmp_path, spec, {**TEXT, "vocab_size": V}))


def test_matrix_called_output_of_another_size_is_not_the_head(tmp_path: Path) -> None:
    spec = decoder()
    spec["model.output.weight"] = ("BF16", (H, H))
    del spec["lm_head.weight"]
    info = measure(tmp_path, spec, TEXT)
    assert (info.head_bpw, info.head_bits, info.head_elements) == (None, None, None)


DRAFTS = [
    "mtp.layers.0.w.weight", "model.mtp.0.w.weight", "mtp_block.w.weight", "model.mtp_head.weight",
    "nextn_layers.0.w.weight", "multi_token_prediction.layers.0.w.weight", "model.next_n_predict.0.w.weight",
    "model.layers.2.eh_proj.weight", "draft_model.layers.0.w.weight", "eagle_head.fc.weight", "medusa_heads.0.1.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", DRAFTS)
def test_draft_layers_count_apart(tmp_path: Path, name: str) -> None:
    assert_layers_and_head(measure(tmp_path, {**decoder(), name: ("BF16", (200, 200))}, TEXT), draft=40_000)


@pytest.mark.parametrize(
    "name", ["model.lm_head", "lm_head.linear", "embed_out", "output_embeddings", "to_logits", "final_linear"]
)
def test_head_with_a_rare_name_is_found(tmp_path: Path, name: str) -> None:
    spec = decoder()
    spec[f"{name}.weight"] = spec.pop("lm_head.weight")
    assert_layers_and_head(measure(tmp_path, spec, TEXT))


PREFIXES = [
    ("thinker.model.", "thinker."), ("llm.model.", "llm."), ("base_model.model.model.", "base_model.model."),
    ("_orig_mod.model.", "_orig_mod."), ("text_model.model.", "text_model."), ("model.text_model.", ""),
    ("model.model.", "model."),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "above"), PREFIXES, ids=[row[0] for row in PREFIXES])
def test_decoder_below_another_prefix_is_found_beside_strange_towers(tmp_path: Path, prefix: str, above: str) -> None:
    spec = {
        name.replace("model.", prefix) if name.startswith("model.") else above + name: form
        for name, form in decoder().items()
    }
    assert_layers_and_head(measure(tmp_path / "text", spec, TEXT))
    spec |= {"eyes.blocks.0.attn.qkv.weight": ("BF16", (256, 256)), "bridge.0.weight": ("BF16", (H, 32))}
    assert_layers_and_head(measure(tmp_path / "images", spec, MULTIMODAL), vision=256 * 256 + H * 32)


# --- inside a layer -------------------------------------------------------------------------------------------------

# Names below the layer that are left out, and their kinds.
INSIDE = [
    ("mlp.gate.weight", "F32", (H, 8), "router"),
    ("mlp.gate.weight_1", "F32", (H, 8), "router"),  # ERNIE-4.5-VL: the router of the vision experts
    ("ffn.gate.tid2eid", "I64", (V, 6), "router"),  # DeepSeek-V4: the experts of each token
    ("mlp.text_moe.gate.weight", "BF16", (8, H), "router"),
    ("mlp.router.gate.weight", "BF16", (8, H), "router"),
    ("mlp.shared_expert_gate.weight", "BF16", (1, H), "router"),
    ("mlp.router_weights.weight", "F32", (8, H), "router"),  # names that no table has
    ("mlp.experts_gate.weight", "F32", (8, H), "router"),
    ("moe.gating_network.weight", "F32", (8, H), "router"),
    ("mlp.moe_statics.e_score_correction_bias", "F32", (2, 8), "other"),
    ("self_attn.k_scale", "BF16", (8, 1, 1), "other"),  # KV scales per head, from llm-compressor
    ("self_attn.v_scale", "BF16", (8, 1, 1), "other"),
    ("self_attn.q_scale", "BF16", (8, 1, 1), "other"),
    ("self_attn.k_proj.k_scale", "F32", (), "other"),  # ModelOpt
    ("self_attn.k_proj.output_scale", "BF16", (8, 1, 1), "other"),  # compressed-tensors before 0.10
    ("self_attn.prob_output_scale", "F32", (8, 1, 1), "other"),  # Quark
    ("self_attn.key_scale", "F32", (1, 8, 1, 1), "other"),
    ("self_attn.v_scale_inv", "F32", (8, 1), "other"),
    ("self_attn.k_bmm_quantizer._amax", "F32", (8, 1, 1), "other"),
    ("self_attn.k_cache.scale", "F32", (8, 1, 1), "other"),
    ("self_attn.kv_cache_scaling_factor", "F32", (2, 1), "other"),
    ("self_attn.rotary_emb.cos_cached", "F32", (1, 1, H, H), "other"),
    ("attn.compressor.ape", "F32", (4, H), "embedding"),
    ("self_attn.o_proj.lora_A.vision.weight", "BF16", (8, H), "vision"),  # Phi-4-multimodal
    ("self_attn.o_proj.lora_B.speech.weight", "BF16", (H, 8), "vision"),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "kind"), INSIDE, ids=[row[0] for row in INSIDE])
def test_weight_in_a_layer_that_is_left_out(
    tmp_path: Path, name: str, dtype: str, shape: tuple[int, ...], kind: str
) -> None:
    config = {**TEXT, "hidden_size": H}
    before = kinds(measure(tmp_path / "before", decoder(), config)).get(kind) or 0
    info = measure(tmp_path / "after", {**decoder(), f"model.layers.1.{name}": (dtype, shape)}, config)
    assert (info.layer_elements, info.layer_bits) == (LAYERS, 16 * LAYERS)
    assert kinds(info)[kind] == before + prod(shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("self_attn.gate.weight", (8, H)),  # scales the attention's output
        ("mlp.gate.weight", (I, H)),  # a gated MLP, too large for a router
        ("altup.modality_router.weight", (4, H)),  # Gemma 3n
        ("mlp.shared_expert.gate_proj.weight", (I, H)),
        ("mlp.experts_gate_up_proj.weight", (I, H)),
        ("linear_attn.conv1d.weight", (H, 1, 4)),
        ("mlp.experts.w13_weight", (4, I, H)),
    ],
)
def test_weight_in_a_layer_that_is_counted(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    spec = {**decoder(), f"model.layers.1.{name}": ("BF16", shape)}
    assert measure(tmp_path, spec, {**TEXT, "hidden_size": H}).layer_elements == LAYERS + prod(shape)


def test_rotation_is_an_overhead_without_elements(tmp_path: Path) -> None:
    """compressed-tensors keeps online rotations below the module, under SCHEME_LOCATION."""
    spec = {**decoder(), "model.layers.0.mlp.up_proj.R4_input.weight": ("BF16", (H, H))}
    info = measure(tmp_path, spec, TEXT)
    assert (info.layer_elements, info.layer_bits) == (LAYERS, 16 * (LAYERS + H * H))


def test_layers_of_other_forms_are_told_apart(tmp_path: Path) -> None:
    """Layer 0 is dense; 1 and 2 are NVFP4 of other widths; 3 is a draft layer, and dense."""
    base = "model.layers.{}.mlp.up_proj.{}"
    spec: Spec = {"model.embed_tokens.weight": ("BF16", (V, H)), "lm_head.weight": ("BF16", (V, H))}
    spec |= {base.format(number, "weight"): ("BF16", (I, H)) for number in (0, 3)}
    for number, rows in ((1, I), (2, 2 * I)):
        spec[base.format(number, "weight_packed")] = ("U8", (rows, H // 2))
        spec[base.format(number, "weight_scale")] = ("F8_E4M3", (rows, H // 16))
        spec[base.format(number, "weight_global_scale")] = ("F32", (1,))
    info = measure(tmp_path, spec, {**TEXT, "num_hidden_layers": 3})
    assert info.layer_elements == I * H + I * H + 2 * I * H
    assert info.layer_bits == 16 * I * H + 3 * I * (4 * H + 8 * H // 16) + 2 * 32
    assert kinds(info)["draft"] == I * H


def test_each_width_of_packed_integers_is_read(tmp_path: Path) -> None:
    """Rows of 61 and of 64 codes take eight words alike; only weight_shape tells them apart."""
    base = "model.layers.{}.mlp.up_proj.{}"
    spec: Spec = {"lm_head.weight": ("BF16", (V, H))}
    for number, columns in ((0, 64), (1, 61)):
        spec[base.format(number, "weight_shape")] = ("I64", (2,))
        spec[base.format(number, "weight_packed")] = ("I32", (I, 8))
        spec[base.format(number, "weight_scale")] = ("BF16", (I, 1 if columns == 64 else 2))
    path = write_checkpoint(tmp_path, spec, TEXT) / "model.safetensors"
    header, _ = header_of(spec)
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for number, columns in ((0, 64), (1, 61)):
            file.seek(start + header[base.format(number, "weight_shape")]["data_offsets"][0])
            file.write(struct.pack("<2q", I, columns))
    assert inspect(tmp_path).layer_elements == I * 64 + I * 61


# --- fused experts --------------------------------------------------------------------------------------------------

E, O = 4, 96  # noqa: E741
NVFP4 = 4 * E * H * O + 8 * E * H // 16 * O
FUSED: dict[str, tuple[str, Spec, int, str, str | None]] = {
    # name: (quant_method, tensors by what follows "experts.", bits, family, algorithm)
    "ModelOpt, [experts, in, out]": (
        "modelopt",
        {
            "gate_up_proj": ("U8", (E, H // 2, O)),
            "gate_up_proj_weight_scale": ("F8_E4M3", (E, H // 16, O)),
            "gate_up_proj_weight_scale_2": ("F32", ()),
            "gate_up_proj_input_scale": ("F32", ()),
        },
        NVFP4 + 64, "NVFP4", "NVFP4",
    ),
    "ModelOpt, [experts, out, in]": (
        "modelopt",
        {
            "gate_up_proj": ("U8", (E, O, H // 2)),
            "gate_up_proj_weight_scale": ("F8_E4M3", (E, O, H // 16)),
            "gate_up_proj_weight_scale_2": ("F32", (E,)),
        },
        NVFP4 + 32 * E, "NVFP4", "NVFP4",
    ),
    "NVFP4 under vLLM's names": (
        "compressed-tensors",
        {
            "w13_weight_packed": ("U8", (E, O, H // 2)),
            "w13_weight_scale": ("F8_E4M3", (E, O, H // 16)),
            "w13_weight_global_scale": ("F32", (E,)),
            "w13_input_global_scale": ("F32", (E,)),
        },
        NVFP4 + 64 * E, "NVFP4", None,
    ),
    "MXFP4, one tensor": (
        "modelopt",
        {"gate_up_proj": ("U8", (E, O, H // 2)), "gate_up_proj_weight_scale": ("U8", (E, O, H // 32))},
        4 * E * O * H + 8 * E * O * H // 32, "MXFP4", "MXFP4",
    ),
    "MXFP4, gpt-oss": (
        "mxfp4",
        {"gate_up_proj_blocks": ("U8", (E, O, H // 32, 16)), "gate_up_proj_scales": ("U8", (E, O, H // 32))},
        4 * E * O * H + 8 * E * O * H // 32, "MXFP4", None,
    ),
    "FP8 blocks": (
        "fp8",
        {"gate_up_proj": ("F8_E4M3", (E, O, H)), "gate_up_proj_scale_inv": ("F32", (E, 1, 1))},
        8 * E * O * H + 32 * E, "FP8", None,
    ),
    "FP8 with static activations": (
        "fp8",
        {
            "w13_weight": ("F8_E4M3", (E, O, H)),
            "w13_weight_scale": ("F32", (E,)),
            "w13_input_scale": ("F32", (E,)),
        },
        8 * E * O * H + 64 * E, "FP8", None,
    ),
    "INT8": (
        "compressed-tensors",
        {"gate_up_proj": ("I8", (E, O, H)), "gate_up_proj_weight_scale": ("BF16", (E, O, 1))},
        8 * E * O * H + 16 * E * O, "INT", None,
    ),
    "GPTQ": (
        "gptq",
        {
            "gate_up_proj.qweight": ("I32", (E, H // 8, O)),
            "gate_up_proj.qzeros": ("I32", (E, 2, O // 8)),
            "gate_up_proj.scales": ("F16", (E, 2, O)),
        },
        4 * E * O * H + 2 * E * O * (4 + 16), "GPTQ", None,
    ),
    "AWQ": (
        "awq",
        {
            "gate_up_proj.qweight": ("I32", (E, H, O // 8)),
            "gate_up_proj.qzeros": ("I32", (E, 2, O // 8)),
            "gate_up_proj.scales": ("F16", (E, 2, O)),
        },
        4 * E * O * H + 2 * E * O * (4 + 16), "AWQ", None,
    ),
    "bitsandbytes": (
        "bitsandbytes",
        {
            "gate_up_proj": ("U8", (E * O * H // 2, 1)),
            "gate_up_proj.absmax": ("F32", (E * O * H // 64,)),
            "gate_up_proj.quant_map": ("F32", (16,)),
            "gate_up_proj.quant_state.bitsandbytes__nf4": ("U8", (90,)),
        },
        4 * E * O * H + 32 * E * O * H // 64 + 16 * 32 + 8 * 90, "bitsandbytes", None,
    ),
    "linear layers of Granite": (
        "fp8",
        {"input_linear.weight": ("F8_E4M3", (E, O, H)), "input_linear.weight_scale": ("BF16", (E, O, 1))},
        8 * E * O * H + 16 * E * O, "FP8", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_match_figures_by_hand(tmp_path: Path, name: str) -> None:
    method, tensors, bits, family, algorithm = FUSED[name]
    spec: Spec = {"model.embed_tokens.weight": ("BF16", (V, H)), "lm_head.weight": ("BF16", (V, H))}
    for layer in range(2):
        spec |= {f"model.layers.{layer}.mlp.experts.{key}": entry for key, entry in tensors.items()}
        spec[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"] = ("BF16", (E, O))
    quantization = {"quant_method": method} | ({"quant_algo": algorithm} if algorithm else {})
    info = measure(tmp_path, spec, {**TEXT, "quantization_config": quantization})
    assert (info.layer_elements, info.layer_bits, info.family) == (2 * E * O * H, 2 * bits, family), info.notes
    assert kinds(info) == {"embedding": V * H, "other": 2 * E * O}


@pytest.mark.parametrize("scale", [(E, H // 32, O), (E, O, H // 8), (H // 16, O)])
def test_fused_experts_with_other_scales_give_null(tmp_path: Path, scale: tuple[int, ...]) -> None:
    base = "model.layers.0.mlp.experts.gate_up_proj"
    spec = {
        **decoder(),
        base: ("U8", (E, H // 2, O)),
        f"{base}_weight_scale": ("F8_E4M3", scale),
        f"{base}_weight_scale_2": ("F32", ()),
    }
    info = measure(tmp_path, spec, TEXT)
    assert (info.layer_bpw, info.layer_bits, info.layer_elements, info.vram_gb) == (None,) * 4
    assert any(base in note for note in info.notes)


# --- formats and their names ----------------------------------------------------------------------------------------


def test_deepseek_v4_as_published_matches_figures_by_hand(tmp_path: Path) -> None:
    """FP8 blocks with an E8M0 scale each, and experts of two FP4 codes per int8 with an E8M0 scale per 32."""
    spec: Spec = {
        "embed.weight": ("BF16", (V, 256)),
        "head.weight": ("BF16", (V, 256)),
        "hc_head_fn": ("F32", (4, 256)),
        "layers.0.attn.wq_a.weight": ("F8_E4M3", (128, 256)),
        "layers.0.attn.wq_a.scale": ("F8_E8M0", (1, 2)),
        "layers.0.ffn.experts.0.w1.weight": ("I8", (64, 128)),
        "layers.0.ffn.experts.0.w1.scale": ("F8_E8M0", (64, 8)),
        "layers.0.ffn.gate.weight": ("BF16", (4, 256)),
        "layers.0.ffn.gate.tid2eid": ("I64", (V, 2)),
        "mtp.0.e_proj.weight": ("F8_E4M3", (128, 256)),
        "mtp.0.e_proj.scale": ("F8_E8M0", (1, 2)),
    }
    quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    info = measure(tmp_path, spec, {**TEXT, "num_hidden_layers": 1, "quantization_config": quantization})
    assert info.layer_elements == 4 * 256 + 128 * 256 + 64 * 256
    assert info.layer_bits == 32 * 4 * 256 + (8 * 128 * 256 + 2 * 8) + (4 * 64 * 256 + 8 * 64 * 8)
    assert (info.head_bpw, info.head_elements) == (16, V * 256)
    assert kinds(info) == {"embedding": V * 256, "router": 4 * 256 + V * 2, "draft": 128 * 256}


def test_int8_with_as_many_scales_as_codes_of_eight_bits_gives_null(tmp_path: Path) -> None:
    base = "model.layers.0.mlp.up_proj"
    spec = {**decoder(), f"{base}.weight": ("I8", (I, H)), f"{base}.scale": ("F8_E8M0", (I, H // 32))}
    assert measure(tmp_path, spec, TEXT).layer_bpw is None


def mx(bits: int) -> dict[str, Any]:
    args = {"num_bits": bits, "type": "float", "group_size": 32, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": {**args, "dynamic": True}}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("packed", "quantization", "bits", "family", "scheme"),
    [
        (("weight_packed", "U8", (I, 3 * H // 4)), mx(6), 6, "MXFP6", "mxfp6"),
        (("weight_packed", "U8", (I, H // 2)), mx(4), 4, "MXFP4", "mxfp4a4"),
        (("weight", "F8_E4M3", (I, H)), mx(8), 8, "FP8", "mxfp8"),
        (("weight", "F8_E4M3", (I, H)), {"quant_method": "mxfp8"}, 8, "FP8", "mxfp8"),
        (("weight", "F8_E4M3", (I, H)), {"quant_method": "modelopt", "quant_algo": "MXFP8"}, 8, "FP8", "mxfp8"),
    ],
)
def test_microscaled_floats_match_figures_by_hand(
    tmp_path: Path, packed: Any, quantization: dict[str, Any], bits: int, family: str, scheme: str
) -> None:
    """compressed-tensors 0.20 packs four 6-bit codes into three bytes; one exponent byte per 32 weights."""
    suffix, dtype, shape = packed
    spec: Spec = {"model.embed_tokens.weight": ("BF16", (V, H)), "lm_head.weight": ("BF16", (V, H))}
    for layer in range(2):
        spec[f"model.layers.{layer}.mlp.up_proj.{suffix}"] = (dtype, shape)
        spec[f"model.layers.{layer}.mlp.up_proj.weight_scale"] = ("U8", (I, H // 32))
    info = measure(tmp_path, spec, {**TEXT, "quantization_config": quantization})
    assert (info.layer_elements, info.layer_bits) == (2 * I * H, 2 * (bits * I * H + 8 * I * H // 32))
    assert (info.family, info.scheme) == (family, scheme)


@pytest.mark.parametrize("method", ["intel/auto-round", "intel/auto_round", "auto_round", "auto-round"])
def test_auto_round_is_known_by_its_former_names(tmp_path: Path, method: str) -> None:
    base = "model.layers.0.mlp.up_proj"
    spec: Spec = {
        "lm_head.weight": ("BF16", (V, 128)),
        f"{base}.qweight": ("I32", (16, I)),
        f"{base}.qzeros": ("I32", (1, I // 8)),
        f"{base}.scales": ("F16", (1, I)),
    }
    config = {**TEXT, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    info = measure(tmp_path, spec, config)
    assert (info.layer_elements, info.layer_bits) == (128 * I, 4 * 128 * I + (4 + 16) * I)
    assert (info.family, info.scheme) == ("GPTQ", "auto-round-w4-g128")


@pytest.mark.parametrize("constant", ["Infinity", "-Infinity", "NaN"])
def test_bare_constants_in_config_are_read(tmp_path: Path, constant: str) -> None:
    """transformers before 5 wrote time_step_limit of Nemotron-H, Falcon-H1 and Granite 4-H so."""
    write_checkpoint(tmp_path, decoder(), TEXT)
    text = json.dumps(TEXT)[:-1] + f', "time_step_limit": [0.0, {constant}], "quantization_config": null}}'
    (tmp_path / "config.json").write_text(text)
    assert_layers_and_head(inspect(tmp_path))
    (tmp_path / "config.json").write_text(text.replace('"quantization_config": null', f'"hidden_size": {constant}'))
    assert_layers_and_head(inspect(tmp_path))


# --- the quick reader of headers ------------------------------------------------------------------------------------


def read_both(path: Path) -> tuple[Any, Any]:
    raw = path.read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    return _compact(path, header, len(raw)), _parsed(path, header, len(raw))


@pytest.mark.parametrize("name", DECODERS)
def test_quick_and_strict_reader_agree_on_files_of_the_library(tmp_path: Path, name: str) -> None:
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, (_, shape) in decoder(name).items()}
    save_file(
        {**tensors, "scalar": torch.zeros(()), "empty": torch.zeros(0, 3)}, tmp_path / "model.safetensors", {"a": "b"}
    )
    quick, strict = read_both(tmp_path / "model.safetensors")
    assert quick is not None
    assert list(quick[0]) == list(strict[0])
    assert quick[1] == strict[1] == {"a": "b"}
    runs = [
        sorted((run.stack or "", run.rest, run.form, run.index, tuple(run.numbers)) for run in header.runs)
        for header, _ in (quick, strict)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "entry",
    [
        '"a":{"dtype":"F32","shape":[04],"data_offsets":[0,16]}',
        '"a":{"dtype":"F32","shape":[4],"data_offsets":[00,16]}',
        '"a":{"dtype":"F32","shape":[4],"x":"y","data_offsets":[0,16]}',
        '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}',
        '"a":{"shape":[4],"dtype":"F32","data_offsets":[0,16]}',
        '"a\\u0062":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}',
        '"a"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}',
        '"a\tb":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}',
        '"a":{"dtype":"F32","shape":[4,],"data_offsets":[0,16]}',
        '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},',
        '"a":{"dtype":"U128","shape":[1],"data_offsets":[0,16]}',
        '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}',
        '"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
    ],
)
def test_quick_reader_leaves_unusual_headers_to_the_strict_one(tmp_path: Path, entry: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", ("{" + entry + "}").encode(), 16)
    raw = path.read_bytes()
    assert _compact(path, raw[8:-16], len(raw)) is None


def mixture(layers: int, experts: int) -> Spec:
    """Return a mixture with enough experts that the reader foresees the entries of all layers but the first."""
    spec = decoder()
    for layer in range(layers):
        for expert in range(experts):
            module = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            spec[f"{module}.weight_packed"] = ("U8", (I, H // 2))
            spec[f"{module}.weight_scale"] = ("F8_E4M3", (I, H // 16))
            spec[f"{module}.weight_global_scale"] = ("F32", (1,))
    return spec


def shards_of(spec: Spec, count: int) -> dict[str, Spec]:
    names = list(spec)
    size = -(-len(names) // count)
    return {
        f"model-{number + 1:05d}-of-{count:05d}.safetensors": {
            name: spec[name] for name in names[number * size : (number + 1) * size]
        }
        for number in range(count)
    }


def write_compact(folder: Path, shards: dict[str, Spec], indent: int | None = 2) -> Path:
    """Write shards as the library writes them, with an index as `save_pretrained` writes it."""
    for name, spec in shards.items():
        header, size = header_of(spec)
        write_raw(folder / name, json.dumps(header, separators=(",", ":")).encode(), size)
    weight_map = {tensor: name for name, spec in shards.items() for tensor in spec}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=indent, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(TEXT | {"num_hidden_layers": 4}))
    return folder


@pytest.mark.parametrize("indent", [2, None])
@pytest.mark.parametrize("order", ["by layer", "by dtype, as safetensors sorts"])
def test_mixture_in_shards_has_the_figures_of_one_file(tmp_path: Path, indent: int | None, order: str) -> None:
    spec = mixture(4, 70)
    if order != "by layer":
        spec = dict(sorted(spec.items(), key=lambda item: (item[1][0], item[0])))
    spec["model.layers.2.mlp.experts.33.up_proj.weight_scale"] = ("F8_E4M3", (I, H // 32))  # not like the others
    whole = measure(tmp_path / "whole", spec, TEXT | {"num_hidden_layers": 4})
    for count in (2, 3, 7):
        folder = tmp_path / str(count)
        folder.mkdir()
        assert inspect(write_compact(folder, shards_of(spec, count), indent)) == whole
    assert whole.layer_elements is None, "the odd scale contradicts its codes"
    assert "experts.33" in " ".join(whole.notes)


def test_experts_that_differ_in_one_layer_are_told_apart(tmp_path: Path) -> None:
    """Expert 1 is left dense in layer 2, and layer 3 is a draft layer: figures by hand, not from one expert for all."""
    spec = mixture(4, 3)
    module = "model.layers.2.mlp.experts.1.up_proj"
    for suffix in ("weight_packed", "weight_scale", "weight_global_scale"):
        del spec[f"{module}.{suffix}"]
    spec[f"{module}.weight"] = ("BF16", (I, H))
    packed, dense = (4 * I * H + 8 * I * (H // 16) + 32), 16 * I * H
    own = measure(tmp_path / "decoder", decoder(), TEXT | {"num_hidden_layers": 3})
    info = measure(tmp_path / "mixture", spec, TEXT | {"num_hidden_layers": 3})
    assert info.layer_elements == own.layer_elements + 9 * I * H
    assert info.layer_bits == own.layer_bits + 8 * packed + dense
    assert {part.kind: part.bits for part in info.excluded}["draft"] == 3 * packed


def test_quick_and_strict_reader_agree_on_a_mixture(tmp_path: Path) -> None:
    (name, spec), *_ = shards_of(mixture(3, 70), 1).items()
    write_compact(tmp_path, {name: spec})
    quick, strict = read_both(tmp_path / name)
    assert quick is not None
    assert list(quick[0]) == list(strict[0])
    assert [(run.stack, run.rest, run.form, run.numbers) for run in quick[0].runs] == [
        (run.stack, run.rest, run.form, run.numbers) for run in strict[0].runs
    ]


@pytest.mark.parametrize("change", ["renamed", "left out", "twice", "in another shard"])
def test_index_that_differs_from_the_shards_is_noticed(tmp_path: Path, change: str) -> None:
    shards = shards_of(mixture(2, 70), 2)
    write_compact(tmp_path, shards)
    index = tmp_path / "model.safetensors.index.json"
    first, second = shards
    name = next(tensor for tensor in shards[first] if tensor.endswith("weight_packed"))
    line = f'"{name}": "{first}"'
    text = index.read_text()
    assert line in text
    index.write_text(text.replace(line, {
        "renamed": f'"{name}x": "{first}"', "left out": f'"{name[:-1]}": "{first}"', "twice": f"{line}, {line}",
        "in another shard": f'"{name}": "{second}"',
    }[change]))  # fmt: skip
    with pytest.raises(StorageError, match="twice" if change == "twice" else "lacks"):
        inspect(tmp_path)
