"""Builders of checkpoints for the storage tests: sparse files with real headers and without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "I64": 8}
Spec = Mapping[str, tuple[str, tuple[int, ...]]]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def finish_gguf(writer: Any) -> None:
    """Write what a `gguf.GGUFWriter` has collected, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_raw(path: Path, header: Any, data_bytes: int) -> Path:
    """Write a safetensors file with any header (bytes, or an object to dump), followed by `data_bytes` of hole."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + data_bytes)
    return path


def header_of(spec: Spec) -> tuple[dict[str, Any], int]:
    """Return the header of contiguous tensors {name: (dtype, shape)}, and the bytes of their data."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in spec.items():
        end = position + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header, position


def write_checkpoint(folder: Path, spec: Spec, config: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint folder of one safetensors file, with a config.json unless `config` is None."""
    write_raw(folder / "model.safetensors", *header_of(spec))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, shards: Mapping[str, Spec], config: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of several shards {file name: tensors} with an index."""
    weight_map = {tensor: name for name, spec in shards.items() for tensor in spec}
    for name, spec in shards.items():
        write_raw(folder / name, *header_of(spec))
    write_index(folder, weight_map)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """Write a shard index with any weight_map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def real_header(name: str, folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a checkpoint with the header of a real one (fixtures/*.json) and without weights."""
    header = json.loads((FIXTURES / f"{name}.json").read_text())["header"]
    size = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    write_raw(folder / "model.safetensors", header, size)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense(
    layers: int = 2, hidden: int = 64, inner: int = 96, vocab: int = 128, dtype: str = "BF16"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of a small Llama: embedding, head, and per layer three matrices, a bias and a norm."""
    spec: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (dtype, (vocab, hidden)),
        "lm_head.weight": (dtype, (vocab, hidden)),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        spec[f"{prefix}.self_attn.qkv_proj.weight"] = (dtype, (2 * hidden, hidden))
        spec[f"{prefix}.self_attn.qkv_proj.bias"] = (dtype, (2 * hidden,))
        spec[f"{prefix}.mlp.up_proj.weight"] = (dtype, (inner, hidden))
        spec[f"{prefix}.mlp.down_proj.weight"] = (dtype, (hidden, inner))
        spec[f"{prefix}.input_layernorm.weight"] = (dtype, (hidden,))
    return spec
