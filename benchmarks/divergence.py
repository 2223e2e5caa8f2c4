"""What measuring divergence costs: the same windows scored by one loaded model, without and with `reference=`.

    python benchmarks/divergence.py vllm_nvfp4 MODEL [--windows 40] [--output FILE.json] [ENGINE_ARG=VALUE …]
    python benchmarks/divergence.py llamacpp FILE.gguf --windows 2 --reference-from hf_quant:FOLDER

plain       scores alone
reference   scores and divergence from a stored reference, its reading and checking included
save        scores, and the reference is written (a new folder each time); left out where the model's output matrix is
            quantized, which no reference of hidden states can have

The ways take turns in one process; medians of repeated runs. The reference is the model's own (which costs what any
other does), or with --reference-from another model's. Windows are random tokens. Peak GPU memory is of each way, the
weights and the KV pool in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.gpu_turns import turn
from lmeval_ext.errors import UserError

GIB = 1024**3
SMALL_CHUNK = 64  # tokens, beside the default


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=("vllm_nvfp4", "hf_quant", "llamacpp", "exllamav3", "exllamav2"))
    parser.add_argument("model")
    parser.add_argument("--reference-from", metavar="ADAPTER:MODEL")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lock", type=Path, help="measure only while holding this file (benchmarks/gpu_turns.py)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("engine", nargs="*", metavar="ENGINE_ARG=VALUE")
    return parser.parse_intermixed_args()


def load(adapter: str, model: str, engine: list[str]) -> Any:
    import lm_eval.models
    from lm_eval.api.registry import get_model

    from lmeval_ext import _register

    _register.register_models(lm_eval.models)
    pairs = dict(pair.split("=", 1) for pair in engine)
    values = {k: json.loads(v) if v[:1] in "[{0123456789tf" else v for k, v in pairs.items()}
    return get_model(adapter)(pretrained=model, **values)


class Bench:
    """One loaded model, and windows to score."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        from lmeval_ext.requests import window_request

        other = options.reference_from.split(":", 1) if options.reference_from else None
        self.scratch, self.saved = scratch, 0
        self.model = load(options.adapter, options.model, options.engine)
        rng = random.Random(0)
        ids = [[rng.randrange(self.model.vocabulary) for _ in range(options.length)] for _ in range(options.windows)]
        self.windows = [window_request(str(i), w, 1, {}, (None, None, None)) for i, w in enumerate(ids)]
        self.tokens = options.windows * options.length
        writer = load(*other, []) if other else self.model
        self.run(writer, save_reference=str(scratch / "reference"))
        del writer
        release()
        self.stored = sum(path.stat().st_size for path in (scratch / "reference").rglob("*.safetensors"))

    def run(self, model: Any, **reference: Any) -> float:
        """Seconds of scoring all windows."""
        from lmeval_ext.divergence.arguments import ReferenceArguments

        model.reference_arguments = ReferenceArguments.take(dict(reference))
        start = time.perf_counter()
        model._loglikelihood_tokens(self.windows)
        taken = time.perf_counter() - start
        model.reference_arguments = ReferenceArguments()
        return taken

    def ways(self) -> dict[str, dict[str, Any]]:
        self.saved += 1
        folder = str(self.scratch / "reference")
        return {
            "plain": {},
            "reference": {"reference": folder},
            f"reference_chunk={SMALL_CHUNK}": {"reference": folder, "reference_chunk": SMALL_CHUNK},
            "save": {"save_reference": str(self.scratch / f"saved-{self.saved}")},
        }

    def measure(self, repeats: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        left_out: set[str] = set()
        for repeat in range(repeats + 1):  # the first warms up
            for name, reference in self.ways().items():
                if name in left_out:
                    continue
                reset_peak()
                try:
                    taken = self.run(self.model, **reference)
                except UserError as error:
                    if name != "save" or "reference_mode=logits" not in str(error):
                        raise
                    print(f"{name}: left out: {error}")
                    left_out.add(name)
                    continue
                peaks[name] = max(peaks.get(name, 0.0), peak_gib())
                if repeat:
                    times.setdefault(name, []).append(taken)
        medians = {name: statistics.median(t) for name, t in times.items()}
        return {
            "tokens_per_second": {name: self.tokens / t for name, t in medians.items()},
            "times_plain": {name: t / medians["plain"] for name, t in medians.items()},
            "runs_seconds": times,
            "peak_gib": peaks,
            "stored_bytes": self.stored,
            "float32_logits_bytes": sum(len(w.target_ids) for w in self.windows) * self.model.vocabulary * 4,
        }


def release() -> None:
    """The memory of a model that is gone: peaks are of the one that is measured."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        facts = bench.model.describe()
        report: dict[str, Any] = {
            "model": Path(options.model).name,
            "engine": f"{facts.engine} {facts.engine_version}",
            "device": facts.device,
            "kernel": facts.kernel,
            "windows": options.windows,
            "length": options.length,
        }
        with turn(options.lock):
            report |= bench.measure(options.repeats)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    print(f"\n{report['model']} on {report['device']}, {report['engine']}, kernel {report['kernel']}")
    ratio = report["float32_logits_bytes"] / report["stored_bytes"]
    print(f"the reference takes {report['stored_bytes'] / 1e6:.1f} MB; float32 logits {ratio:.1f} times as much")
    print(f"{'way':20} {'tokens/s':>10} {'time':>7} {'peak GiB':>9}")
    for name, speed in report["tokens_per_second"].items():
        print(f"{name:20} {speed:10,.0f} {report['times_plain'][name]:6.2f}× {report['peak_gib'][name]:9.2f}")


if __name__ == "__main__":
    main()
