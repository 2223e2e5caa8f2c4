"""Times the storage accounting (`lmeval_ext.storage.inspect`) on headers of large models: CPU seconds, medians.

    python benchmarks/storage_headers.py [NAME ...] [--folder DIR ...] [--repeats 5]

Writes NVFP4 checkpoints with the names and shapes of real models, as `save_pretrained` writes them: shards of 5 GB, the
tensors of each by dtype and name, a sorted index. The data are holes in sparse files, so no disk is used. --folder
measures a checkpoint of your own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lmeval_ext.storage import inspect

SHARD = 5_000_000_000  # bytes, the default of `save_pretrained`
BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


class Shape(NamedTuple):
    """Sizes of a mixture of experts; experts 0: a dense model."""

    layers: int
    experts: int
    hidden: int
    inner: int
    vocabulary: int


SHAPES = {
    "toy": Shape(2, 3, 64, 32, 128),
    "llama-3.1-8b": Shape(32, 0, 4096, 14336, 128256),
    "qwen3-30b-a3b": Shape(48, 128, 2048, 768, 151936),
    "minimax-m2": Shape(62, 256, 3072, 1536, 200064),
    "deepseek-v3": Shape(61, 256, 7168, 2048, 129280),
    "qwen3-next-80b": Shape(48, 512, 2048, 512, 151936),
}

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def matrix(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """Yields the tensors of one NVFP4 matrix of compressed-tensors."""
    yield f"{name}.weight_packed", "U8", (rows, columns // 2)
    yield f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16)
    yield f"{name}.weight_global_scale", "F32", (1,)
    yield f"{name}.input_global_scale", "F32", (1,)


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Yields all tensors of a model, layer by layer."""
    yield "model.embed_tokens.weight", "BF16", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        below = f"model.layers.{layer}"
        yield f"{below}.input_layernorm.weight", "BF16", (shape.hidden,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from matrix(f"{below}.self_attn.{name}", shape.hidden, shape.hidden)
        if shape.experts:
            yield f"{below}.mlp.gate.weight", "BF16", (shape.experts, shape.hidden)
        for expert in range(shape.experts) or [""]:
            module = f"{below}.mlp.experts.{expert}" if shape.experts else f"{below}.mlp"
            yield from matrix(f"{module}.gate_proj", shape.inner, shape.hidden)
            yield from matrix(f"{module}.up_proj", shape.inner, shape.hidden)
            yield from matrix(f"{module}.down_proj", shape.hidden, shape.inner)
    yield "lm_head.weight", "BF16", (shape.vocabulary, shape.hidden)


def write(folder: Path, shape: Shape) -> None:
    """Writes a checkpoint's headers, index and config.json."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors(shape):
        size = math.prod(tensor[2]) * BYTES[tensor[1]]
        if filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, dtype, sizes in sorted(shard, key=lambda tensor: (-BYTES[tensor[1]], tensor[1], tensor[0])):
            begin, end = end, end + math.prod(sizes) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
            weight_map[name] = file_name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    config = {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocabulary,
        "quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Returns the median and smallest CPU seconds of `inspect`, and what it found."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        info = inspect(folder)
        seconds.append(time.process_time() - start)
    header_bytes = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header_bytes += int.from_bytes(file.read(8), "little")
    return {
        "median_cpu_s": statistics.median(seconds),
        "least_cpu_s": min(seconds),
        "header_mb": header_bytes / 1e6,
        "layer_bpw": info.layer_bpw if info.layer_bpw is not None else math.nan,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models, from {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a checkpoint of your own")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(SHAPES):
        parser.error(f"unknown model {', '.join(sorted(unknown))}: expected some of {', '.join(SHAPES)}")
    names = options.names or ([] if options.folder else list(SHAPES))
    figures = {}
    print(
        f"{'model':24} {'median':>8} {'least':>8} {'headers':>9} {'bpw':>8}   (CPU seconds of {options.repeats} runs)"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            (Path(scratch) / name).mkdir()
            write(Path(scratch) / name, SHAPES[name])
        for folder in [*(Path(scratch) / name for name in names), *options.folder]:
            row = figures[folder.name] = measure(folder, options.repeats)
            print(
                f"{folder.name:24} {row['median_cpu_s']:6.2f} s {row['least_cpu_s']:6.2f} s "
                f"{row['header_mb']:6.1f} MB {row['layer_bpw']:8.4f}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
