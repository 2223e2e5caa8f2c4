"""How fast windows are scored on ExLlamaV3 or V2, against the engine's bare forward: one process, one model, a GPU.

    python benchmarks/exllama_scoring.py --model DIR --engine exllamav3 --output small.json
    python benchmarks/exllama_scoring.py --random DIR --shape 8b --windows 24 --output 8b.json
    python benchmarks/exllama_scoring.py --random DIR --engine exllamav2 --shape small

Three ways, in tokens a second (medians of repeated runs over the same random windows):

bare forward      the engine's public forward over whole batches, logits dropped, at the best batch size of --batches
one window        one window a call, log-softmax in float32 of all logits, one sum fetched: as ExLlamaV3's eval/ppl.py
                  and compare_q score
this project      `score_windows` of the adapter, batch size "auto"

--random makes a checkpoint of random weights in DIR, once, and takes it for --model: EXL3, or EXL2 for ExLlamaV2, at 4
bits per weight, with the shape of Llama 3.1 8B (6 GB, seconds) or of SmolLM2-135M, widened as EXL3 needs it. (An EXL2
that its converter made has several widths in one matrix; here each has one.)
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.gpu_turns import turn

GIB = 1024**3
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SMALL = LLAMA_8B | {
    "vocab_size": 49152, "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
SHAPES = {"8b": LLAMA_8B, "small": SMALL}
_MUL1 = 0x83DCD12D - (1 << 32)  # the codebook's multiplier, as int32 (exllamav3, exl3_lib/quantize.py)
_STD = 0.02  # of the weights, near that of initialized ones
_GROUP = 128  # rows of an EXL2 group


# ---------------------------------------------------------------------- a checkpoint of random weights


def exl3_linear(name: str, inputs: int, outputs: int, bits: int, device: str) -> dict[str, torch.Tensor]:
    """Tensors of one EXL3 matrix."""
    tiles = (inputs // 16, outputs // 16, 16 * bits)

    def signs(n: int) -> torch.Tensor:
        return torch.randint(0, 2, (n,), device=device).half() * 2 - 1

    return {
        f"{name}.suh": signs(inputs).cpu(),
        f"{name}.svh": (signs(outputs) * _STD).cpu(),
        f"{name}.trellis": torch.randint(-(2**15), 2**15, tiles, dtype=torch.int16, device=device).cpu(),
        f"{name}.mul1": torch.tensor(_MUL1, dtype=torch.int32),
    }


def exl2_linear(name: str, inputs: int, outputs: int, bits: int, device: str) -> dict[str, torch.Tensor]:
    """Tensors of one EXL2 matrix (lmeval_ext/decoding/exl2.py says what they mean), one width for all its rows."""
    groups, words = inputs // _GROUP, _GROUP * bits // 32

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, size, dtype=torch.int64, device=device).int().cpu()

    starts = torch.arange(groups) * words
    # Root mean squares: of the codes (2^bits / √12), and 0.48 of a scale, of which q_scale_max is the largest
    largest = _STD / (2**bits / 12**0.5) / 0.48
    return {
        f"{name}.q_weight": integers(groups * words, outputs),
        f"{name}.q_scale": integers(groups, outputs // 8),
        f"{name}.q_scale_max": torch.full((groups,), largest, dtype=torch.float16),
        f"{name}.q_groups": torch.stack([torch.full_like(starts, bits), starts], dim=1).flatten().short(),
        f"{name}.q_invperm": torch.randperm(inputs).int(),
    }


def random_checkpoint(
    folder: Path, shape: dict[str, Any], engine: str = "exllamav3", bits: int = 4, head_bits: int = 6
) -> None:
    """A checkpoint of a shape in the engine's own format: random matrices and embeddings, norms of one."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    c, device = shape, "cuda" if torch.cuda.is_available() else "cpu"
    linear = exl3_linear if engine == "exllamav3" else exl2_linear
    hidden, inner = int(c["hidden_size"]), int(c["intermediate_size"])
    kv = int(c["num_key_value_heads"]) * int(c["head_dim"])
    vocabulary, layers = int(c["vocab_size"]), int(c["num_hidden_layers"])
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    dense = torch.bfloat16 if engine == "exllamav3" else torch.float16  # as the converters leave them
    ones = torch.ones(hidden, dtype=dense)
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    embeddings = (torch.randn(vocabulary, hidden, device=device) * _STD).to(dense).cpu()
    head = {"model.embed_tokens.weight": embeddings, "model.norm.weight": ones.clone()}
    save("model-head.safetensors", head | linear("lm_head", hidden, vocabulary, head_bits, device))
    for start in range(0, layers, 8):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(start, min(start + 8, layers)):
            prefix = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = ones.clone()
            for name, (inputs, outputs) in shapes.items():
                tensors |= linear(f"{prefix}.{name}", inputs, outputs, bits, device)
        save(f"model-layers-{start:02d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    quantization: dict[str, Any] = {"bits": float(bits), "head_bits": head_bits}
    quantization |= (
        {"quant_method": "exl3", "version": "1.6.5", "codebook": "mul1", "out_scales": "auto"}
        if engine == "exllamav3"
        else {"quant_method": "exl2", "version": "0.3.2"}
    )
    # Last: a folder without config.json is made anew
    (folder / "config.json").write_text(json.dumps(c | {"quantization_config": quantization}, indent=2))


# ---------------------------------------------------------------------- what is timed


class Bench:
    """The ways to score `ids` (int64 [windows, length], on the CPU) on one adapter."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        from lmeval_ext.requests import window_request

        self.model, self.ids = model, ids
        self.requests = [window_request("w", row, 1, {}, (None, None, None)) for row in ids.tolist()]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The engine's own public forward: logits of all positions."""
        own = self.model.engine.model
        if self.model.engine_name == "exllamav3":
            return own.forward(rows, {"attn_mode": "flash_attn_nc"})
        return own.forward(rows, cache=None)

    @torch.inference_mode()
    def bare(self, batch: int) -> None:
        for start in range(0, len(self.ids), batch):
            self.forward(self.ids[start : start + batch])

    @torch.inference_mode()
    def one_window(self) -> float:
        total = 0.0
        for row in self.ids:
            logits = self.forward(row[None])[:, :-1, : self.model.vocabulary].float()
            targets = row[None, 1:, None].to(logits.device)
            total += torch.log_softmax(logits, dim=-1).gather(-1, targets).sum().item()
        return total

    def ours(self) -> float:
        return float(sum(scores.loglikelihood for scores in self.model.score_windows(self.requests)))


def seconds(work: Callable[[], Any], repeats: int) -> tuple[list[float], float, Any]:
    """(seconds of each run after a first that is not timed, peak GiB of GPU memory, what the last run returned)."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, answer = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        answer = work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times, torch.cuda.max_memory_allocated() / GIB, answer


def sweep(bench: Bench, batches: list[int], limit: int | None) -> dict[int, float]:
    """Tokens a second of the bare forward, once for each batch size that fits."""
    rates: dict[int, float] = {}
    for batch in batches:
        if batch > len(bench.ids) or (limit is not None and batch * bench.ids.shape[1] > limit):
            continue
        try:
            times, _, _ = seconds(lambda batch=batch: bench.bare(batch), 1)
        except torch.cuda.OutOfMemoryError:
            print(f"bare forward, {batch} windows: out of memory")
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        rates[batch] = bench.ids.numel() / times[0]
        print(f"bare forward, {batch:3d} windows a call: {rates[batch]:10,.0f} tokens/s", flush=True)
    return rates


def measure(bench: Bench, options: argparse.Namespace) -> tuple[dict[int, float], dict[str, dict[str, Any]]]:
    """(tokens a second of the bare forward by batch size, figures of each way)."""
    batches = [int(b) for b in options.batches.split(",")]
    rates = sweep(bench, batches, bench.model.engine.token_limit)
    best = max(rates, key=lambda b: rates[b])
    ours_batch = bench.model.batching.rows(options.length)
    rows: dict[str, dict[str, Any]] = {}
    for name, batch, work in (
        ("bare forward", best, lambda: bench.bare(best)),
        ("one window", 1, bench.one_window),
        ("this project", ours_batch, bench.ours),
    ):
        times, peak, answer = seconds(work, min(options.repeats, 2) if name == "one window" else options.repeats)
        gc.collect()
        torch.cuda.empty_cache()
        rows[name] = {
            "batch": batch,
            "seconds": times,
            "tokens_per_second": bench.ids.numel() / statistics.median(times),
            "peak_gib": peak,
            "loglikelihood": answer,
        }
    return rates, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--engine", default="exllamav3", choices=("exllamav3", "exllamav2"))
    parser.add_argument("--random", metavar="DIR", help="make (once) and take a random model")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the random model")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="batch sizes of the bare forward to try")
    parser.add_argument("--batch-size", default="auto", help="of this project's way")
    parser.add_argument("--model-args", default="{}", help="JSON: more arguments of the adapter")
    parser.add_argument("--lock", type=Path, help="measure only while holding this file (benchmarks/gpu_turns.py)")
    parser.add_argument("--output", help="write everything to this JSON file")
    options = parser.parse_args()
    if options.random:
        start = time.perf_counter()
        random_checkpoint(Path(options.random), SHAPES[options.shape], options.engine)
        print(f"random checkpoint: {time.perf_counter() - start:.1f} s", flush=True)
    folder = options.model or options.random
    if not folder:
        parser.error("name a checkpoint with --model, or make one with --random")

    from lm_eval.api.registry import get_model

    from lmeval_ext import _hook

    _hook.install()
    import lm_eval.models

    from lmeval_ext import _register

    _register.register_models(lm_eval.models)
    arguments = {"max_length": max(8192, options.length), **json.loads(options.model_args)}
    start = time.perf_counter()
    model = get_model(options.engine)(pretrained=folder, batch_size=options.batch_size, **arguments)
    print(f"loaded in {time.perf_counter() - start:.1f} s", flush=True)
    rng = np.random.default_rng(0)
    shape = (options.windows, options.length)
    bench = Bench(model, torch.from_numpy(rng.integers(3, model.vocabulary, size=shape)))

    with turn(options.lock):
        rates, rows = measure(bench, options)
    limit, single = rows["bare forward"]["tokens_per_second"], rows["one window"]["tokens_per_second"]
    print(f"\n{torch.cuda.get_device_name()}, {options.engine} {model.engine_version}, {model.label}")
    print(f"{options.windows} windows of {options.length} tokens, medians of {options.repeats} runs\n")
    print("| way | windows a call | tokens/s | of bare forward | of one window | peak GiB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, row in rows.items():
        row["of_bare"], row["of_one_window"] = row["tokens_per_second"] / limit, row["tokens_per_second"] / single
        print(
            f"| {name} | {row['batch']} | {row['tokens_per_second']:,.0f} | {row['of_bare']:.3f} | "
            f"{row['of_one_window']:.2f} | {row['peak_gib']:.2f} |"
        )
    own, ours = rows["one window"]["loglikelihood"], rows["this project"]["loglikelihood"]
    print(f"\nsum of log-probabilities: one window {own:.3f}, this project {ours:.3f} ({ours / own - 1:+.1e})")
    if options.output:
        record = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "engine": options.engine,
            "engine_version": model.engine_version, "model": model.label, "windows": options.windows,
            "length": options.length, "sweep": rates, "ways": rows,
            "quantization": model.get_model_info()["quantization"],
        }  # fmt: skip
        Path(options.output).write_text(json.dumps(record, indent=2))


if __name__ == "__main__":  # tensor parallel starts processes that import this file
    main()
