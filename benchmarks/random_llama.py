"""A random-weight Llama checkpoint for timing: no model of that size is needed, only its shapes.

    python benchmarks/random_llama.py DIR [--shape llama-3-8b|smollm2-135m] [--scheme nvfp4|bfloat16]

Default: the shape of Llama 3 8B, NVFP4 with 16-bit activations in compressed-tensors' layout (4.5 bits per weight,
5.7 GB on disk). On a GPU it takes seconds. Weights have the scale of a trained model's, so that activations stay
finite; the text that it models is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

Shape = dict[str, int]
SHAPES: dict[str, Shape] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
}  # fmt: skip
GROUP = 16
STD = 0.02  # of trained Llamas' matrices


def config(scheme: str, shape: Shape) -> dict[str, object]:
    """config.json, with the quantization that the scheme asks for."""
    found: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    if scheme == "nvfp4":
        weights = {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP, "symmetric": True,
            "dynamic": False, "scale_dtype": "torch.float8_e4m3fn", "observer": "static_minmax",
        }  # fmt: skip
        found["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        }
    return found


def linears(model: Shape) -> dict[str, tuple[int, int]]:
    """Name to (outputs, inputs) of each quantized matrix."""
    hidden, ffn = model["hidden_size"], model["intermediate_size"]
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    return {
        f"model.layers.{i}.{name}": shape for i in range(model["num_hidden_layers"]) for name, shape in shapes.items()
    }


def quantized(shape: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    """Random FP4 codes (root mean square 3.4 of e2m1's values) with scales that bring them to STD."""
    outputs, inputs = shape
    global_scale = 448 * 6 / (6 * STD)
    return {
        "weight_packed": torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device),
        "weight_scale": torch.full((outputs, inputs // GROUP), STD / 3.4 * global_scale, device=device).to(
            torch.float8_e4m3fn
        ),
        "weight_global_scale": torch.tensor([global_scale], dtype=torch.float32, device=device),
    }


def make(folder: Path, model: Shape, scheme: str = "nvfp4") -> None:
    """Write config, weights (a file for every four layers) and a word-level tokenizer of a few words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    hidden, vocabulary = model["hidden_size"], model["vocab_size"]

    def dense(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * STD

    def norm() -> torch.Tensor:
        return torch.ones(hidden, device=device, dtype=torch.bfloat16)

    parts: list[dict[str, torch.Tensor]] = [
        {"model.embed_tokens.weight": dense(vocabulary, hidden), "model.norm.weight": norm()},
        {"lm_head.weight": dense(vocabulary, hidden)},
    ]
    index: dict[str, str] = {}
    names = list(linears(model).items())
    per_file = 7 * 4
    total = len(parts) + -(-len(names) // per_file)
    for number in range(total):
        tensors = parts[number] if number < len(parts) else {}
        for name, shape in names[max(0, number - len(parts)) * per_file :][:per_file] if number >= len(parts) else []:
            found = quantized(shape, device) if scheme == "nvfp4" else {"weight": dense(*shape)}
            tensors |= {f"{name}.{k}": v for k, v in found.items()}
            if name.endswith("q_proj"):
                layer = name.removesuffix(".self_attn.q_proj")
                tensors |= {f"{layer}.{n}.weight": norm() for n in ("input_layernorm", "post_attention_layernorm")}
        file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config(scheme, model), indent=1))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Enough of a tokenizer for an engine to start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", choices=("nvfp4", "bfloat16"), default="nvfp4")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options = parser.parse_args()
    make(options.folder, SHAPES[options.shape], options.scheme)


if __name__ == "__main__":
    main()
