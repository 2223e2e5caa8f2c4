"""Times the cost of measuring divergence: one loaded model scores the same windows without and with `reference=`.

    python benchmarks/divergence.py vllm_nvfp4 MODEL [--windows 40] [--output FILE.json] [ENGINE_ARG=VALUE …]
    python benchmarks/divergence.py llamacpp FILE.gguf --windows 2 --reference-from hf_quant:FOLDER

plain       scores alone
reference   scores and divergence from a stored reference; reading and checking the store is included
save        scores, and writes the reference to a new folder each time; left out where the model's output matrix is
            quantized, because a reference of hidden states needs a dense one

Prints tokens per second (medians of repeated runs, the ways taking turns), the time of each way over plain, and peak
GPU memory with the weights and the KV pool. The reference comes from the model itself, which costs as much as any
other, or from another model with --reference-from. Windows are random tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.common import (
    add_common_options,
    engine_arguments,
    load_adapter,
    peak_gib,
    random_windows,
    release,
    reset_peak,
    timed,
    turn,
    window_requests,
)
from lmeval_ext.errors import UserError

SMALL_CHUNK = 64  # tokens; measured beside the default


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=("vllm_nvfp4", "hf_quant", "llamacpp", "exllamav3", "exllamav2"))
    parser.add_argument("model")
    parser.add_argument("--reference-from", metavar="ADAPTER:MODEL")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=2048)
    add_common_options(parser, repeats=5)
    return parser.parse_intermixed_args(argv)


class Bench:
    """One loaded model, and windows to score."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.scratch, self.saved = scratch, 0
        self.model = load_adapter(options.adapter, options.model, **engine_arguments(options.engine))
        ids = random_windows(random.Random(0), self.model.vocabulary, options.windows, options.length)
        self.windows = window_requests(ids)
        self.tokens = options.windows * options.length
        writer = load_adapter(*options.reference_from.split(":", 1)) if options.reference_from else self.model
        self.run(writer, save_reference=str(scratch / "reference"))
        del writer
        release()
        self.stored = sum(path.stat().st_size for path in (scratch / "reference").rglob("*.safetensors"))

    def run(self, model: Any, **reference: Any) -> float:
        """Scores all windows and returns the seconds."""
        from lmeval_ext.divergence.arguments import ReferenceArguments

        model.reference_arguments = ReferenceArguments.take(dict(reference))
        seconds, _ = timed(lambda: model._loglikelihood_tokens(self.windows))
        model.reference_arguments = ReferenceArguments()
        return seconds

    def ways(self) -> dict[str, dict[str, Any]]:
        """Returns the reference arguments of each way; `save` gets a new folder."""
        self.saved += 1
        folder = str(self.scratch / "reference")
        return {
            "plain": {},
            "reference": {"reference": folder},
            f"reference_chunk={SMALL_CHUNK}": {"reference": folder, "reference_chunk": SMALL_CHUNK},
            "save": {"save_reference": str(self.scratch / f"saved-{self.saved}")},
        }

    def measure(self, repeats: int) -> dict[str, Any]:
        """Returns the medians of every way, the ways taking turns."""
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        left_out: set[str] = set()
        for repeat in range(repeats + 1):  # the first run warms up
            for name, reference in self.ways().items():
                if name in left_out:
                    continue
                reset_peak()
                try:
                    seconds = self.run(self.model, **reference)
                except UserError as error:
                    if name != "save" or "reference_mode=logits" not in str(error):
                        raise
                    print(f"{name}: left out: {error}")
                    left_out.add(name)
                    continue
                peaks[name] = max(peaks.get(name, 0.0), peak_gib())
                if repeat:
                    times.setdefault(name, []).append(seconds)
        medians = {name: statistics.median(t) for name, t in times.items()}
        return {
            "tokens_per_second": {name: self.tokens / t for name, t in medians.items()},
            "times_plain": {name: t / medians["plain"] for name, t in medians.items()},
            "runs_seconds": times,
            "peak_gib": peaks,
            "stored_bytes": self.stored,
            "float32_logits_bytes": sum(len(w.target_ids) for w in self.windows) * self.model.vocabulary * 4,
        }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
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
    print(f"the reference takes {report['stored_bytes'] / 1e6:.1f} MB; float32 logits take {ratio:.1f} times as much")
    print(f"{'way':20} {'tokens/s':>10} {'time':>7} {'peak GiB':>9}")
    for name, speed in report["tokens_per_second"].items():
        print(f"{name:20} {speed:10,.0f} {report['times_plain'][name]:6.2f}× {report['peak_gib'][name]:9.2f}")


if __name__ == "__main__":
    main()
