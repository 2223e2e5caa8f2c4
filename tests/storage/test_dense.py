"""Full-precision checkpoints: roles of the tensors, tied embeddings, towers, drafts, shards."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from lmeval_ext.storage import StorageError, inspect
from tests.storage.builders import (
    LLAMA,
    dense,
    header_of,
    write_checkpoint,
    write_index,
    write_raw,
    write_sharded,
)

MATRICES = 2 * (128 * 64 + 96 * 64 + 64 * 96)  # elements in `dense()`: two layers of qkv, up, down
HEAD = 128 * 64


def kinds(info: Any) -> dict[str, tuple[int, int | None]]:
    return {part.kind: (part.bits, part.elements) for part in info.excluded}


@pytest.mark.parametrize(
    ("dtype", "scheme", "bits"), [("BF16", "bfloat16", 16), ("F16", "float16", 16), ("F32", "float32", 32)]
)
def test_dense_model_matches_figures_by_hand(tmp_path: Path, dtype: str, scheme: str, bits: int) -> None:
    info = inspect(write_checkpoint(tmp_path, dense(dtype=dtype), LLAMA))
    assert (info.layer_bpw, info.head_bpw, info.file_bpw) == (bits, bits, bits)
    assert (info.layer_elements, info.head_elements) == (MATRICES, HEAD)
    assert info.vram_gb == (MATRICES + HEAD) * bits / 8 / 1024**3
    other = 2 * (128 + 64)  # biases and norms
    assert kinds(info) == {"embedding": (bits * HEAD, HEAD), "other": (bits * other, other)}
    assert info.weight_bytes == (MATRICES + 2 * HEAD + other) * bits // 8
    assert (info.family, info.scheme, info.tied, info.notes) == ("full precision", scheme, False, ())


def test_record_is_frozen_and_plain_json(tmp_path: Path) -> None:
    info = inspect(write_checkpoint(tmp_path, dense(), LLAMA))
    with pytest.raises(FrozenInstanceError):
        info.layer_bpw = 1.0  # type: ignore[misc]
    record = info.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["excluded"][0] == {"kind": "embedding", "bits": 16 * HEAD, "elements": HEAD}


def test_single_file_reads_config_in_its_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dense(), LLAMA)
    assert inspect(tmp_path / "model.safetensors") == inspect(str(tmp_path))


def without_head(**config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = dense()
    del spec["lm_head.weight"]
    merged = {**LLAMA, **config}
    return spec, {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize("tie", [True, None], ids=["in config.json", "left out, a causal model"])
def test_tied_model_uses_embedding_as_head(tmp_path: Path, tie: bool | None) -> None:
    info = inspect(write_checkpoint(tmp_path, *without_head(tie_word_embeddings=tie)))
    assert (info.head_bpw, info.head_elements, info.tied) == (16, HEAD, True)
    assert "embedding" not in kinds(info)
    assert any("tied" in note for note in info.notes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"tie_word_embeddings": None, "architectures": ["LlamaModel"]}, "nothing says that the model is tied"),
    ],
)
def test_missing_output_matrix_gives_null(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    info = inspect(write_checkpoint(tmp_path, *without_head(**config)))
    assert (info.head_bpw, info.vram_gb, info.layer_bpw) == (None, None, 16)
    assert any(reason in note for note in info.notes)


def test_stored_copy_of_tied_head_is_the_head(tmp_path: Path) -> None:
    info = inspect(write_checkpoint(tmp_path, dense(), {**LLAMA, "tie_word_embeddings": True}))
    assert (info.head_elements, info.tied) == (HEAD, False)
    assert kinds(info)["embedding"] == (16 * HEAD, HEAD)


def test_tie_in_composite_config_is_read(tmp_path: Path) -> None:
    spec, config = without_head(tie_word_embeddings=None, architectures=["GemmaModel"])
    assert (
        inspect(write_checkpoint(tmp_path, spec, {**config, "text_config": {"tie_word_embeddings": True}})).tied is True
    )


# Weights outside the layers, each with its kind in `Excluded`
EXCLUDED = [
    ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision"),
    ("visual.blocks.7.attn.qkv.weight", "vision"),
    ("multi_modal_projector.linear_1.weight", "vision"),
    ("model.audio_tower.layers.9.fc1.weight", "vision"),
    ("mtp.layers.0.mlp.up_proj.weight", "draft"),
    ("model.layers.2.mlp.up_proj.weight", "draft"),
    ("model.layers.2.embed_tokens.weight", "draft"),
    ("model.layers.2.shared_head.head.weight", "draft"),
    ("eagle_module.fc.weight", "draft"),
    ("model.layers.0.mlp.gate.weight", "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
    ("model.layers.0.block_sparse_moe.gate.weight", "router"),
    ("model.layers.0.feed_forward.router.weight", "router"),
    ("model.layers.0.self_attn.q_norm.weight", "other"),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", "other"),
    ("transformer.wpe.weight", "embedding"),
    ("model.embed_tokens_per_layer.weight", "embedding"),
]


@pytest.mark.parametrize(("name", "kind"), EXCLUDED)
def test_weight_outside_the_layers_is_excluded(tmp_path: Path, name: str, kind: str) -> None:
    plain = inspect(write_checkpoint(tmp_path / "plain", dense(), LLAMA))
    info = inspect(write_checkpoint(tmp_path / "more", {**dense(), name: ("F32", (10, 3))}, LLAMA))
    assert (info.layer_bits, info.layer_elements, info.head_bits) == (
        plain.layer_bits,
        plain.layer_elements,
        plain.head_bits,
    )
    bits, elements = kinds(plain).get(kind, (0, 0))
    assert elements is not None
    assert kinds(info)[kind] == (bits + 32 * 30, elements + 30)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.gate_proj.weight",
        "transformer.h.1.attn.c_attn.weight",
        "model.decoder.layers.5.fc1.weight",
    ],
)
def test_weight_of_a_layer_is_counted(tmp_path: Path, name: str) -> None:
    info = inspect(write_checkpoint(tmp_path, {**dense(), name: ("F32", (4, 10, 3))}, LLAMA))
    assert info.layer_elements == MATRICES + 120


@pytest.mark.parametrize("name", ["language_model.lm_head.weight", "embed_out.weight", "output.weight"])
def test_head_with_another_name_is_recognised(tmp_path: Path, name: str) -> None:
    spec = dense()
    spec[name] = spec.pop("lm_head.weight")
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert (info.head_elements, info.layer_elements) == (HEAD, MATRICES)


def test_draft_layers_follow_the_text_config(tmp_path: Path) -> None:
    """num_hidden_layers of the text config counts, not that of the outer config."""
    config = {**LLAMA, "num_hidden_layers": 99, "text_config": {"num_hidden_layers": 1}}
    info = inspect(write_checkpoint(tmp_path, dense(), config))
    assert info.layer_elements == MATRICES // 2
    assert "draft" in kinds(info)


def test_every_bit_is_counted_once(tmp_path: Path) -> None:
    spec = {**dense(), **{name: ("F32", (10, 3)) for name, _ in EXCLUDED}}
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert info.layer_bits + info.head_bits + sum(part.bits for part in info.excluded) == 8 * info.weight_bytes


def test_buffers_are_not_an_unknown_packing(tmp_path: Path) -> None:
    spec = {**dense(), "h.0.attn.bias": ("U8", (1, 1, 8, 8)), "model.position_ids": ("I64", (1, 8))}
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert (info.layer_bpw, info.notes) == (16, ())


def test_checkpoint_without_config_is_measured(tmp_path: Path) -> None:
    info = inspect(write_checkpoint(tmp_path, dense()))
    assert (info.layer_bpw, info.head_bpw, info.scheme) == (16, 16, "bfloat16")
    assert any("config.json" in note for note in info.notes)


def shards() -> dict[str, dict[str, Any]]:
    names = list(dense())
    spec = dense()
    parts = [names[:3], names[3:8], names[8:]]
    return {
        f"model-{number:05d}-of-00003.safetensors": {name: spec[name] for name in part}
        for number, part in enumerate(parts, start=1)
    }


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    single = inspect(write_checkpoint(tmp_path / "single", dense(), LLAMA))
    assert inspect(write_sharded(tmp_path / "sharded", shards(), LLAMA)) == single


def test_one_shard_reads_the_complete_checkpoint(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, shards(), LLAMA)
    info = inspect(folder / "model-00002-of-00003.safetensors")
    assert info.layer_elements == MATRICES
    assert any("whole checkpoint" in note for note in info.notes)


def test_shards_without_index_are_read_by_number(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, shards(), LLAMA)
    (folder / "model.safetensors.index.json").unlink()
    assert inspect(folder).layer_elements == MATRICES
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match=r"1 of 3 shards are missing \(model-00002-of-00003"):
        inspect(folder)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, shards(), LLAMA)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match=r"1 of 3 shards are missing \(model-00003-of-00003"):
        inspect(folder)


def test_indexed_tensor_missing_from_its_shard_raises(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, shards(), LLAMA)
    weight_map = {name: file for file, spec in shards().items() for name in spec}
    write_index(folder, {**weight_map, "model.layers.1.extra": "model-00001-of-00003.safetensors"})
    with pytest.raises(StorageError, match=r"lacks 'model.layers.1.extra'"):
        inspect(folder)


def test_tensors_missing_from_the_index_are_counted_and_noted(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, shards(), LLAMA)
    weight_map = {name: file for file, spec in shards().items() for name in spec if "up_proj" not in name}
    write_index(folder, weight_map)
    info = inspect(folder)
    assert info.layer_elements == MATRICES
    assert any("2 tensors stand in the shards but not in" in note for note in info.notes)


def test_several_files_without_index_must_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_raw(tmp_path / f"{name}.safetensors", *header_of(dense()))
    with pytest.raises(StorageError, match=r"a\.safetensors, b\.safetensors"):
        inspect(tmp_path)
    assert inspect(tmp_path / "a.safetensors").layer_elements == MATRICES


def test_70b_model_in_thirty_shards_matches_figures_by_hand(tmp_path: Path) -> None:
    """Llama-3-70B's shapes in NVFP4: 80 layers of 64 x 128 query and 8 x 128 key heads, 141 GB of bf16 in 40 GB."""
    hidden, inner, kv, vocab = 8192, 28672, 1024, 128256
    matrices = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    matrices |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    spec: dict[str, Any] = {
        "model.embed_tokens.weight": ("BF16", (vocab, hidden)),
        "lm_head.weight": ("BF16", (vocab, hidden)),
    }
    for layer in range(80):
        for name, (out, inputs) in matrices.items():
            base = f"model.layers.{layer}.{name}_proj"
            spec[f"{base}.weight_packed"] = ("U8", (out, inputs // 2))
            spec[f"{base}.weight_scale"] = ("F8_E4M3", (out, inputs // 16))
            spec[f"{base}.weight_global_scale"] = ("F32", (1,))
    names = list(spec)
    parts = {
        f"model-{n:05d}-of-00030.safetensors": {name: spec[name] for name in names[n - 1 :: 30]} for n in range(1, 31)
    }
    folder = write_sharded(tmp_path, parts, {**LLAMA, "num_hidden_layers": 80})
    elements = 80 * sum(out * inputs for out, inputs in matrices.values())
    info = inspect(folder)
    assert info.layer_elements == elements == 68_451_041_280
    assert info.layer_bits == 9 * elements // 2 + 32 * 7 * 80
    assert info.head_bits == 16 * vocab * hidden
