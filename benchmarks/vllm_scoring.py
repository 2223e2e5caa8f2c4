"""What scoring prompts costs in vLLM: bare prefill, the limit, the guide's way, stock lm-eval, and ours. One process.

    python benchmarks/vllm_scoring.py MODEL [--windows 80] [--repeats 5] [--output FILE.json] [-- ENGINE_ARG=VALUE …]

bare        prefill alone: no score of any token
limit       prefill and the output matrix on every scored position; no softmax, nothing brought back
guide       prompt_logprobs=1, one window a call (the way of the guides on comparing quantizations)
stock       the harness' `vllm` class: prompt_logprobs=1, all windows at once
flat        prompt_logprobs=0, flat_logprobs=True: our fallback
ours        `vllm_nvfp4`

Windows are random tokens, new ones for every call, so that no prefix cache serves them. `--choices` adds multiple
choice: questions with four answers that share a long context, stock against ours. Medians of repeated runs, in turn;
peak memory is what a way needs beyond bare prefill.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.gpu_turns import turn

EXTENSION = "benchmarks.vllm_limit.LimitedWorker"
GIB = 1024**3

Sample = list[list[int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--guide-windows", type=int, default=8, help="windows of the slow way")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--choices", type=int, default=0, metavar="QUESTIONS")
    parser.add_argument("--lock", type=Path, help="measure only while holding this file (benchmarks/gpu_turns.py)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("engine", nargs="*", metavar="ENGINE_ARG=VALUE")
    return parser.parse_intermixed_args()


class Bench:
    """One engine, and the ways to score with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        import lmeval_ext.models.vllm.adapter as ours

        engine = dict(pair.split("=", 1) for pair in options.engine)
        values = {k: json.loads(v) if v[:1] in "[{0123456789tf" else v for k, v in engine.items()}
        self.options = options
        self.model = ours.VLLMQuantized(
            options.model, max_model_len=options.length + 1, worker_extension_cls=EXTENSION, **values
        )
        # the adapter knows its own extension only; this one is a subclass of it
        self.client = self.model._engine = ours.EngineScoring(self.model.model)
        self.model._own_worker = True
        self.model.batch_size = "auto"
        self.vocabulary = self.model.vocabulary
        self.random = random.Random(0)
        self.stock_class = ours.VLLM

    def windows(self, n: int) -> Sample:
        """Fresh random windows."""
        return [[self.random.randrange(self.vocabulary) for _ in range(self.options.length)] for _ in range(n)]

    def questions(self, n: int) -> list[tuple[None, list[int], list[int]]]:
        """n questions with four choices: 5-shot-like contexts of 600 tokens, answers of 1 to 20."""
        asked = []
        for _ in range(n):
            context = [self.random.randrange(self.vocabulary) for _ in range(self.random.randrange(560, 640))]
            for _ in range(4):
                answer = [self.random.randrange(self.vocabulary) for _ in range(self.random.randrange(1, 20))]
                asked.append((None, context, answer))
        return asked

    # ------------------------------------------------------------- the ways

    def bare(self, windows: Sample) -> None:
        self._generate(windows)

    def limit(self, windows: Sample) -> None:
        self.model.model.collective_rpc("lmeval_ext_limit", args=(True,))
        self.client._run([self._prompt(w) for w in windows], [None] * len(windows), False, False)
        self.model.model.collective_rpc("lmeval_ext_limit", args=(False,))

    def guide(self, windows: Sample) -> None:
        for window in windows:
            for token in self._generate([window], prompt_logprobs=1)[0].prompt_logprobs[1:]:
                next(iter(token.values()))

    def stock(self, windows: Sample) -> None:
        self.stock_class._loglikelihood_tokens(self.model, [(None, w[:1], w[1:]) for w in windows], disable_tqdm=True)

    def flat(self, windows: Sample) -> None:
        self._generate(windows, prompt_logprobs=0, flat_logprobs=True)

    def ours(self, windows: Sample) -> None:
        from lmeval_ext.requests import window_request

        requests = [window_request("w", w, 1, {}, (None, None, None)) for w in windows]
        self.model._loglikelihood_tokens(requests)

    def choices_stock(self, questions: Any) -> None:
        self.stock_class._loglikelihood_tokens(self.model, questions, disable_tqdm=True)

    def choices_ours(self, questions: Any) -> None:
        self.model._loglikelihood_tokens(questions, disable_tqdm=True)

    def _prompt(self, window: list[int]) -> Any:
        from lmeval_ext.models.vllm.client import ScoringPrompt

        return ScoringPrompt(window, 1)

    def _generate(self, windows: Sample, **scores: Any) -> Any:
        import vllm

        params = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True, **scores)
        prompts = [vllm.TokensPrompt(prompt_token_ids=w) for w in windows]
        return self.model.model.generate(prompts, sampling_params=params, use_tqdm=False)

    # ------------------------------------------------------------- measuring

    def seconds(self, way: Callable[[Any], None], sample: Any) -> tuple[float, float | None]:
        """Wall time, and GiB at the peak above what the weights and the KV pool take."""
        rpc = self.model.model.collective_rpc
        rpc("lmeval_ext_reset_peak")
        start = time.perf_counter()
        way(sample)
        taken = time.perf_counter() - start
        reports = rpc("lmeval_ext_report")
        peaks = [r["peak_bytes"] for r in reports]
        return taken, None if None in peaks else sum(peaks) / GIB

    def measure(self) -> dict[str, Any]:
        """Medians of every way, the ways taking turns."""
        n = self.options.windows
        ways: dict[str, tuple[Callable[[Any], None], int]] = {
            "bare": (self.bare, n),
            "limit": (self.limit, n),
            "guide": (self.guide, min(n, self.options.guide_windows)),
            "stock": (self.stock, n),
            "flat": (self.flat, n),
            "ours": (self.ours, n),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        peaks: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(self.options.repeats + 1):  # the first warms up: graphs, kernels, allocator
            for name, (way, count) in ways.items():
                slow = name in ("guide", "stock", "flat")
                if slow and repeat > 3:
                    continue
                taken, peak = self.seconds(way, self.windows(count))
                if repeat:
                    times[name].append(count * self.options.length / taken)
                    if peak is not None:
                        peaks[name].append(peak)
        speed = {name: statistics.median(t) for name, t in times.items()}
        return {
            "tokens_per_second": speed,
            "runs": times,
            "of_limit": {name: s / speed["limit"] for name, s in speed.items()},
            "ours_over": {name: speed["ours"] / s for name, s in speed.items()},
            "peak_gib": {name: max(p) if p else None for name, p in peaks.items()},
        }

    def measure_choices(self) -> dict[str, Any]:
        """Requests per second, stock against ours."""
        result: dict[str, list[float]] = {"stock": [], "ours": []}
        for repeat in range(self.options.repeats + 1):
            for name, way in (("stock", self.choices_stock), ("ours", self.choices_ours)):
                if name == "stock" and repeat > 3:
                    continue
                questions = self.questions(self.options.choices)
                taken, _ = self.seconds(way, questions)
                if repeat:
                    result[name].append(len(questions) / taken)
        medians = {name: statistics.median(values) for name, values in result.items()}
        return {"requests_per_second": medians, "ours_over_stock": medians["ours"] / medians["stock"]}


def main() -> None:
    options = arguments()
    bench = Bench(options)
    report: dict[str, Any] = {"model": Path(options.model).name, "windows": options.windows, "length": options.length}
    facts = bench.model.describe()
    report |= {"engine": f"vllm {facts.engine_version}", "device": facts.device, "kernel": facts.kernel}
    with turn(options.lock):
        report |= bench.measure()
        if options.choices:
            report["multiple_choice"] = bench.measure_choices()
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    print(f"\n{report['model']} on {report['device']}, {report['engine']}, kernel {report['kernel']}")
    print(f"{'way':8} {'tokens/s':>10} {'of limit':>9} {'ours is':>9} {'peak GiB':>9}")
    for name, speed in report["tokens_per_second"].items():
        peak = report["peak_gib"][name]
        shown = "" if peak is None else f"{peak:9.2f}"
        print(f"{name:8} {speed:10,.0f} {report['of_limit'][name]:9.3f} {report['ours_over'][name]:8.1f}× {shown}")
    if options.choices:
        print("multiple choice:", json.dumps(report["multiple_choice"]))


if __name__ == "__main__":
    main()
