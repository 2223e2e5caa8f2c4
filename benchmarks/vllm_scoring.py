"""Times prompt scoring in vLLM: bare prefill, the limit, the guides' way, stock lm-eval and this project.

    python benchmarks/vllm_scoring.py MODEL [--windows 80] [--repeats 5] [--output FILE.json] [-- ENGINE_ARG=VALUE …]

bare        prefill alone: no token is scored
limit       prefill and the output matrix on every scored position; no softmax, no result returned
guide       prompt_logprobs=1, one window per call (as guides on comparing quantizations do)
stock       the harness' `vllm` class: prompt_logprobs=1, all windows at once
flat        prompt_logprobs=0, flat_logprobs=True: this project's fallback
ours        `vllm_nvfp4`

One process. Prints tokens per second (medians of repeated runs, the ways taking turns), each way's share of the limit,
how many times as fast `ours` is, and peak GPU memory. Windows are random tokens, new for every call, so that no prefix
cache serves them. --choices adds multiple choice: questions with four answers that share a long context, stock against
ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.common import GIB, add_common_options, engine_arguments, random_windows, turn, window_requests

SLOW_WAYS = ("guide", "stock", "flat")
SLOW_REPEATS = 3  # timed runs of a slow way, at most
CONTEXT = (560, 640)  # tokens of a question's context, like five examples
ANSWER = (1, 20)

Windows = list[list[int]]
Questions = list[tuple[None, list[int], list[int]]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--guide-windows", type=int, default=8, help="windows of the guides' slow way")
    parser.add_argument("--choices", type=int, default=0, metavar="QUESTIONS")
    add_common_options(parser, repeats=5)
    return parser.parse_intermixed_args(argv)


def drop_logits(worker: Any, drop: bool) -> None:
    """Runs in vLLM's worker: from now on its scorer computes logits and keeps nothing, or scores again.

    Logits of None are what a rank without them passes on, and the scorer skips them.
    """
    scorer = worker.lmeval_ext_scorer
    if not drop:
        scorer.compute_logits = scorer.compute_logits.wrapped
        return
    compute_logits = scorer.compute_logits

    def computed_and_dropped(hidden_states: Any) -> None:
        compute_logits(hidden_states)

    computed_and_dropped.wrapped = compute_logits  # type: ignore[attr-defined]
    scorer.compute_logits = computed_and_dropped


class Bench:
    """One loaded engine, and the ways to score with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends `drop_logits` to worker processes
        import lmeval_ext.models.vllm.adapter as ours

        self.options = options
        self.model = ours.VLLMQuantized(
            options.model, **{"max_model_len": options.length + 1, **engine_arguments(options.engine)}
        )
        self.model.start_engine()
        self.model.batch_size = "auto"
        self.random = random.Random(0)
        self.stock_class = ours.VLLM

    def windows(self, count: int) -> Windows:
        """Returns new random windows."""
        return random_windows(self.random, self.model.vocabulary, count, self.options.length)

    def questions(self, count: int) -> Questions:
        """Returns `count` questions with four answers each, as the harness' (None, context, continuation)."""
        requests: Questions = []
        for _ in range(count):
            context = self._tokens(*CONTEXT)
            requests += [(None, context, self._tokens(*ANSWER)) for _ in range(4)]
        return requests

    def _tokens(self, least: int, below: int) -> list[int]:
        return random_windows(self.random, self.model.vocabulary, 1, self.random.randrange(least, below))[0]

    # ------------------------------------------------------------- the ways

    def bare(self, windows: Windows) -> None:
        self._generate(windows)

    def limit(self, windows: Windows) -> None:
        from lmeval_ext.models.vllm.scoring import EXTRA_ARG

        self.model.model.collective_rpc(drop_logits, args=(True,))
        # Request 0, scored from position 1; all prompts may have one number, as no score is kept
        self._generate(windows, extra_args={EXTRA_ARG: [0, 1]})
        self.model.model.collective_rpc(drop_logits, args=(False,))

    def guide(self, windows: Windows) -> None:
        for window in windows:
            for token in self._generate([window], prompt_logprobs=1)[0].prompt_logprobs[1:]:
                next(iter(token.values()))

    def stock(self, windows: Windows) -> None:
        self.choices_stock([(None, w[:1], w[1:]) for w in windows])

    def flat(self, windows: Windows) -> None:
        self._generate(windows, prompt_logprobs=0, flat_logprobs=True)

    def ours(self, windows: Windows) -> None:
        self.model._loglikelihood_tokens(window_requests(windows))

    def choices_stock(self, questions: Questions) -> None:
        self.stock_class._loglikelihood_tokens(self.model, questions, disable_tqdm=True)

    def choices_ours(self, questions: Questions) -> None:
        self.model._loglikelihood_tokens(questions, disable_tqdm=True)

    def _generate(self, windows: Windows, **scores: Any) -> Any:
        import vllm

        params = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True, **scores)
        prompts = [vllm.TokensPrompt(prompt_token_ids=w) for w in windows]
        return self.model.model.generate(prompts, sampling_params=params, use_tqdm=False)

    # ------------------------------------------------------------- measuring

    def seconds(self, way: Callable[[Any], None], sample: Any) -> tuple[float, float | None]:
        """Returns wall seconds, and the peak of GPU memory in GiB (None on a CPU)."""
        rpc = self.model.model.collective_rpc
        rpc("lmeval_ext_reset_peak")
        start = time.perf_counter()
        way(sample)
        taken = time.perf_counter() - start
        reports = rpc("lmeval_ext_report")
        peaks = [r["peak_bytes"] for r in reports]
        return taken, None if None in peaks else sum(peaks) / GIB

    def measure(self) -> dict[str, Any]:
        """Returns the medians of every way, the ways taking turns."""
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
        for repeat in range(self.options.repeats + 1):  # the first run warms up graphs, kernels and the allocator
            for name, (way, count) in ways.items():
                if name in SLOW_WAYS and repeat > SLOW_REPEATS:
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
        """Returns requests per second, stock against ours."""
        result: dict[str, list[float]] = {"stock": [], "ours": []}
        for repeat in range(self.options.repeats + 1):
            for name, way in (("stock", self.choices_stock), ("ours", self.choices_ours)):
                if name in SLOW_WAYS and repeat > SLOW_REPEATS:
                    continue
                questions = self.questions(self.options.choices)
                taken, _ = self.seconds(way, questions)
                if repeat:
                    result[name].append(len(questions) / taken)
        medians = {name: statistics.median(values) for name, values in result.items()}
        return {"requests_per_second": medians, "ours_over_stock": medians["ours"] / medians["stock"]}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
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
