"""Writes a Llama-architecture Hugging Face checkpoint as a GGUF file, with gguf's own writer.

    python demo/to_gguf.py MODEL_DIR OUT.gguf [--type BF16]

Matrices are stored in the given type and vectors (norms, biases) in float32, as llama.cpp does. The tokenizer
is GPT-2-style byte-level BPE with llama.cpp's pre-tokenizer "smollm"; others are refused, because a wrong
pre-tokenizer gives other tokens and other figures without an error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_vocab import add_vocabulary
from outputs import UsageError, checkpoint, new_file, run
from safetensors import safe_open
from tqdm import tqdm

# type name: (how gguf quantizes a tensor, what general.file_type says)
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json (UsageError where the written file would compute something else)."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures")
    if architectures != ["LlamaForCausalLM"]:
        raise UsageError(f"{folder} is {architectures}: only LlamaForCausalLM is supported")
    if "quantization_config" in config:
        raise UsageError(f"{folder} is quantized already: give the full-precision checkpoint")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UsageError(f"{folder}: RoPE scaling {rope['rope_type']!r} is not supported")
    return config


def rope_theta(config: dict[str, Any]) -> float:
    """Returns the base of the rotary frequencies; `rope_parameters` holds it since transformers 5."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def add_parameters(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    """Write the hyperparameters that llama.cpp reads for architecture "llama"."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def interleave_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection for llama.cpp's rotary embedding; same shape [out, ...].

    Transformers rotates element i of a head with element i + head_dim / 2, llama.cpp's "llama" architecture
    element 2i with 2i + 1 (`permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(tensor.shape)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors of the folder's safetensors files, one in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                yield name, file.get_tensor(name)


def as_stored(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray:
    """Returns the tensor as gguf stores it: vectors in float32, matrices in `kind`."""
    if tensor.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    values = tensor.float().numpy()
    if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise UsageError(f"{name} has values beyond float16's range: use --type BF16 or F32")
    stored: np.ndarray = gguf.quants.quantize(values, kind)
    return stored


def add_tensors(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], kind: gguf.GGMLQuantizationType) -> None:
    """Write every tensor under llama.cpp's name; an output matrix tied to the embedding is left out."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    rotated = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    for name, tensor in tqdm(read_tensors(folder), desc=f"converting to {kind.name}", unit="tensor"):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UsageError(f"{folder}: tensor {name} is not part of architecture llama")
        projection = name.split(".")[-2]
        if projection in rotated:
            tensor = interleave_heads(tensor, rotated[projection])
        stored = as_stored(tensor, kind, name)
        raw_dtype = kind if tensor.ndim > 1 else None
        writer.add_tensor(target, stored, raw_dtype=raw_dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of a LlamaForCausalLM checkpoint")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="file to write (must not exist)")
    parser.add_argument("--type", choices=TYPES, default="F16", help="storage of the matrices (default: F16)")
    options = parser.parse_args()

    source = checkpoint(options.model_dir)
    config = read_config(source)
    kind, file_type = TYPES[options.type]
    with new_file(options.out) as scratch:
        writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        add_parameters(writer, config, source.resolve().name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, source, config["vocab_size"])
        add_tensors(writer, source, config, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    print(options.out)


if __name__ == "__main__":
    run(main)
