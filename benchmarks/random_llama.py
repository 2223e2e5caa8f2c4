"""Writes a Llama checkpoint with random weights, for timing: speed depends on shapes, not on values.

    python benchmarks/random_llama.py DIR [--shape llama-3-8b] [--scheme nvfp4|bfloat16|exl3|exl2]

Default: the shape of Llama 3 8B in NVFP4 with 16-bit activations, in compressed-tensors' layout (4.5 bits per weight,
5.7 GB on disk). On a GPU it takes seconds. EXL3 and EXL2 have 4 bits per weight and a head of 6 (an EXL2 that its
converter made has several widths in one matrix; here each matrix has one). Weights have the scale of a trained
model's, so that activations stay finite; the text that the model writes is noise. A folder that has a config.json is
kept as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shape = dict[str, int]
Tensors = dict[str, torch.Tensor]

SHAPES: dict[str, Shape] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "smollm2-135m-w768": {  # wider: EXL3 needs multiples of 128
        "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 49152,
    },
    "toy": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 512,
    },
}  # fmt: skip
STD = 0.02  # of trained Llamas' matrices
BITS, HEAD_BITS = 4, 6  # of EXL3 and EXL2
LAYERS_PER_FILE = 4
NVFP4_GROUP = 16  # inputs that share a scale
EXL2_GROUP = 128
EXL3_MUL1 = 0x83DCD12D - (1 << 32)  # the codebook's multiplier, as int32 (exllamav3, exl3_lib/quantize.py)


# ---------------------------------------------------------------------- tensors of one matrix, by suffix


def dense(inputs: int, outputs: int, device: str) -> Tensors:
    """Random bfloat16 weights [outputs, inputs]."""
    return {"weight": torch.randn((outputs, inputs), device=device, dtype=torch.bfloat16) * STD}


def nvfp4(inputs: int, outputs: int, device: str) -> Tensors:
    """Random FP4 codes (root mean square 3.4 of e2m1's values) with scales that bring them to STD."""
    global_scale = 448 * 6 / (6 * STD)
    scale = torch.full((outputs, inputs // NVFP4_GROUP), STD / 3.4 * global_scale, device=device)
    return {
        "weight_packed": torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device),
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([global_scale], dtype=torch.float32, device=device),
    }


def exl3(inputs: int, outputs: int, device: str, bits: int = BITS) -> Tensors:
    """Random trellis codes and signs."""

    def signs(n: int) -> torch.Tensor:
        return torch.randint(0, 2, (n,), device=device).half() * 2 - 1

    tiles = (inputs // 16, outputs // 16, 16 * bits)
    return {
        "suh": signs(inputs),
        "svh": signs(outputs) * STD,
        "trellis": torch.randint(-(2**15), 2**15, tiles, dtype=torch.int16, device=device),
        "mul1": torch.tensor(EXL3_MUL1, dtype=torch.int32),
    }


def exl2(inputs: int, outputs: int, device: str, bits: int = BITS) -> Tensors:
    """Random codes of one width for all rows (lmeval_ext/decoding/exl2.py describes the tensors)."""

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, size, dtype=torch.int64, device=device).int()

    groups, words = inputs // EXL2_GROUP, EXL2_GROUP * bits // 32
    starts = torch.arange(groups) * words
    # Root mean squares: 2^bits / √12 of the codes, and 0.48 q_scale_max of the scales
    scale_max = STD / (2**bits / 12**0.5) / 0.48
    return {
        "q_weight": integers(groups * words, outputs),
        "q_scale": integers(groups, outputs // 8),
        "q_scale_max": torch.full((groups,), scale_max, dtype=torch.float16),
        "q_groups": torch.stack([torch.full_like(starts, bits), starts], dim=1).flatten().short(),
        "q_invperm": torch.randperm(inputs).int(),
    }


def exl3_head(inputs: int, outputs: int, device: str) -> Tensors:
    """The output matrix of an EXL3 checkpoint."""
    return exl3(inputs, outputs, device, HEAD_BITS)


def exl2_head(inputs: int, outputs: int, device: str) -> Tensors:
    """The output matrix of an EXL2 checkpoint."""
    return exl2(inputs, outputs, device, HEAD_BITS)


@dataclass(frozen=True)
class Scheme:
    """How a format stores a model: its linear layers, its output matrix, and `quantization_config`.

    linear, head: (inputs, outputs, device) to tensors by suffix. dtype: of norms and embeddings.
    """

    linear: Callable[[int, int, str], Tensors]
    head: Callable[[int, int, str], Tensors]
    quantization: dict[str, Any] | None
    dtype: torch.dtype = torch.bfloat16


_NVFP4_WEIGHTS = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP, "symmetric": True,
    "dynamic": False, "scale_dtype": "torch.float8_e4m3fn", "observer": "static_minmax",
}  # fmt: skip
_NVFP4_CONFIG = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _NVFP4_WEIGHTS, "input_activations": None}},
}  # fmt: skip
_EXL = {"bits": float(BITS), "head_bits": HEAD_BITS}
SCHEMES = {
    "nvfp4": Scheme(nvfp4, dense, _NVFP4_CONFIG),
    "bfloat16": Scheme(dense, dense, None),
    "exl3": Scheme(
        exl3,
        exl3_head,
        {**_EXL, "quant_method": "exl3", "version": "1.6.5", "codebook": "mul1", "out_scales": "auto"},
    ),
    # The converter leaves what it does not quantize in float16
    "exl2": Scheme(exl2, exl2_head, {**_EXL, "quant_method": "exl2", "version": "0.3.2"}, torch.float16),
}


# ---------------------------------------------------------------------- the checkpoint


def config(shape: Shape, scheme: Scheme) -> dict[str, Any]:
    """Returns the content of config.json."""
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        **shape,
    }
    return settings if scheme.quantization is None else settings | {"quantization_config": scheme.quantization}


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of the linear layers in one block, by name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip


def make(folder: Path, shape: Shape, scheme_name: str = "nvfp4") -> None:
    """Writes config, weights and a word-level tokenizer, unless the folder has a config.json already."""
    if (folder / "config.json").exists():
        return
    scheme, device = SCHEMES[scheme_name], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    hidden, vocabulary, layers = shape["hidden_size"], shape["vocab_size"], shape["num_hidden_layers"]
    index: dict[str, str] = {}

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=scheme.dtype)

    def prefixed(prefix: str, tensors: Tensors) -> Tensors:
        return {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def save(file: str, tensors: Tensors) -> None:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    embeddings = dense(hidden, vocabulary, device)["weight"].to(scheme.dtype)
    save("model-embeddings.safetensors", {"model.embed_tokens.weight": embeddings, "model.norm.weight": norm()})
    save("model-head.safetensors", prefixed("lm_head", scheme.head(hidden, vocabulary, device)))
    for start in range(0, layers, LAYERS_PER_FILE):
        tensors: Tensors = {}
        for layer in range(start, min(start + LAYERS_PER_FILE, layers)):
            block = f"model.layers.{layer}"
            tensors |= {f"{block}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
            for name, (inputs, outputs) in linears(shape).items():
                tensors |= prefixed(f"{block}.{name}", scheme.linear(inputs, outputs, device))
        save(f"model-layers-{start:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_tokenizer(folder)
    # Last: a folder without config.json is incomplete and is written again
    (folder / "config.json").write_text(json.dumps(config(shape, scheme), indent=1))


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of 103 words, enough for an engine to start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", choices=SCHEMES, default="nvfp4")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options = parser.parse_args(argv)
    make(options.folder, SHAPES[options.shape], options.scheme)


if __name__ == "__main__":
    main()
