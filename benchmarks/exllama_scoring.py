"""Times window scoring on ExLlamaV3 or V2 against the engine's bare forward: one process, one model, a GPU.

    python benchmarks/exllama_scoring.py --model DIR --engine exllamav3 --output small.json
    python benchmarks/exllama_scoring.py --random DIR --shape 8b --windows 24 --output 8b.json
    python benchmarks/exllama_scoring.py --random DIR --engine exllamav2 --shape small

Three ways over the same random windows, in tokens per second (medians of repeated runs):

bare forward      the engine's public forward over whole batches, logits dropped, at the best batch size of --batches
one window        one window per call, log-softmax in float32 of all logits, one sum fetched: as ExLlamaV3's eval/ppl.py
                  and compare_q score
this project      `score_windows` of the adapter, batch size "auto"

Prints each way's ratio to the bare forward and to one window per call, and peak GPU memory. --random makes a checkpoint
of random weights in DIR once (benchmarks/random_llama.py) and takes it for --model: EXL3, or EXL2 for ExLlamaV2, at
4 bits per weight, with the shape of Llama 3 8B (6 GB, seconds) or of SmolLM2-135M, widened as EXL3 needs it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.common import load_adapter, peak_gib, release, reset_peak, timed, turn, window_requests

SHAPES = {"8b": "llama-3-8b", "small": "smollm2-135m-w768", "toy": "toy"}  # names in random_llama.SHAPES
SLOW_REPEATS = 2  # timed runs of one window per call, at most

# Logits of all positions by the engine's own public forward: (engine's model, token ids) to logits
FORWARDS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "exllamav3": lambda model, ids: model.forward(ids, {"attn_mode": "flash_attn_nc"}),
    "exllamav2": lambda model, ids: model.forward(ids, cache=None),
}
FORMATS = {"exllamav3": "exl3", "exllamav2": "exl2"}


class Bench:
    """The ways to score `ids` (int64 [windows, length], on the CPU) with one adapter."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.requests = window_requests(ids.tolist())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the logits of all positions."""
        return FORWARDS[self.model.engine_name](self.model.engine.model, rows)

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


def repeated(work: Callable[[], Any], repeats: int) -> tuple[list[float], float, Any]:
    """Returns (seconds of each run after an untimed one, peak GiB of GPU memory, result of the last run)."""
    timed(work)
    reset_peak()
    runs = [timed(work) for _ in range(repeats)]
    return [seconds for seconds, _ in runs], peak_gib(), runs[-1][1]


def sweep(bench: Bench, batches: list[int], limit: int | None) -> dict[int, float]:
    """Returns tokens per second of the bare forward by batch size, for the sizes that fit."""
    rates: dict[int, float] = {}
    for batch in batches:
        if batch > len(bench.ids) or (limit is not None and batch * bench.ids.shape[1] > limit):
            continue
        try:
            times, _, _ = repeated(lambda batch=batch: bench.bare(batch), 1)
        except torch.cuda.OutOfMemoryError:
            print(f"bare forward, {batch} windows: out of memory")
            break
        finally:
            release()
        rates[batch] = bench.ids.numel() / times[0]
        print(f"bare forward, {batch:3d} windows per call: {rates[batch]:10,.0f} tokens/s", flush=True)
    return rates


def measure(bench: Bench, options: argparse.Namespace) -> tuple[dict[int, float], dict[str, dict[str, Any]]]:
    """Returns (tokens per second of the bare forward by batch size, figures of each way)."""
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
        slow = name == "one window"
        times, peak, total = repeated(work, min(options.repeats, SLOW_REPEATS) if slow else options.repeats)
        release()
        rows[name] = {
            "batch": batch,
            "seconds": times,
            "tokens_per_second": bench.ids.numel() / statistics.median(times),
            "peak_gib": peak,
            "loglikelihood": total,
        }
    return rates, rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--engine", default="exllamav3", choices=FORWARDS)
    parser.add_argument("--random", metavar="DIR", help="make a random model there, once, and take it")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the random model")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="batch sizes of the bare forward to try")
    parser.add_argument("--batch-size", default="auto", help="of this project's way")
    parser.add_argument("--model-args", default="{}", help="JSON: more arguments of the adapter")
    parser.add_argument("--lock", type=Path, help="measure only while holding this file: benchmarks that share a GPU")
    parser.add_argument("--output", help="write everything to this JSON file")
    options = parser.parse_args(argv)
    if options.random:
        from benchmarks import random_llama

        start = time.perf_counter()
        shape = random_llama.SHAPES[SHAPES[options.shape]]
        random_llama.make(Path(options.random), shape, FORMATS[options.engine])
        print(f"random checkpoint: {time.perf_counter() - start:.1f} s", flush=True)
    folder = options.model or options.random
    if not folder:
        parser.error("name a checkpoint with --model, or make one with --random")
    arguments = {"max_length": max(8192, options.length), **json.loads(options.model_args)}
    start = time.perf_counter()
    model = load_adapter(options.engine, folder, batch_size=options.batch_size, **arguments)
    print(f"loaded in {time.perf_counter() - start:.1f} s", flush=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.vocabulary, size=(options.windows, options.length))
    bench = Bench(model, torch.from_numpy(ids))
    with turn(options.lock):
        rates, rows = measure(bench, options)
    limit, single = rows["bare forward"]["tokens_per_second"], rows["one window"]["tokens_per_second"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"\n{device}, {options.engine} {model.engine_version}, {model.label}")
    print(f"{options.windows} windows of {options.length} tokens, medians of {options.repeats} runs\n")
    print("| way | windows per call | tokens/s | of bare forward | of one window | peak GiB |")
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
            "gpu": device, "torch": torch.__version__, "engine": options.engine,
            "engine_version": model.engine_version, "model": model.label, "windows": options.windows,
            "length": options.length, "sweep": rates, "ways": rows,
            "quantization": model.get_model_info()["quantization"],
        }  # fmt: skip
        Path(options.output).write_text(json.dumps(record, indent=2))


if __name__ == "__main__":  # tensor parallel starts processes that import this file
    main()
