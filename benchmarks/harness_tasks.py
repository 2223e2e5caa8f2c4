"""Times the harness' tasks: this project against the harness' own class and against the engine's batch API.

    python benchmarks/harness_tasks.py vllm_nvfp4 MODEL [--output FILE.json] [ENGINE_ARG=VALUE …]
    python benchmarks/harness_tasks.py llamacpp FILE.gguf --small

One engine per process, loaded once; the ways take turns on it, and each turn starts with another way. Prints requests
or tokens per second (medians of repeated runs) and how many times as fast `ours` is.

ours      the adapter's own `_loglikelihood_tokens` and `generate_until`
stock     the harness' class of the same engine (`vllm`, `hf`) on the same loaded model; llama.cpp and ExLlama have none
engine    the engine's own batch API. Multiple choice: what it offers to score prompts, or to compute them
bare      the engine computes the prompts, shares what it can, and scores nothing

Multiple choice: questions with four answers of 1 to 12 tokens, all after the same five examples, as in MMLU.
Generation: greedy, and every prompt gets all of its tokens: the end-of-text tokens cannot be chosen (a minimum length
in Transformers and vLLM) or do not stop a job (ExLlama: the jobs get no stop tokens); llama.cpp may stop early, and
the tokens that it generated are counted.
Tokens are random, and new for every run, so that no cache serves them from the last run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.common import engine_arguments
from benchmarks.harness_engines import ENGINES, Engine, Way

SMALL = {"questions": 3, "examples": 150, "prompts": 4, "new_tokens": 16, "repeats": 3}
SPECIAL_IDS = 100  # ids below are not drawn
FULL = {"questions": 40, "examples": 480, "prompts": 32, "new_tokens": 256, "repeats": 3}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=ENGINES)
    parser.add_argument("model", help="checkpoint folder, or GGUF file")
    parser.add_argument("--small", action="store_true", help=f"sizes for a CPU: {SMALL}")
    parser.add_argument("--questions", type=int, help="with four answers each")
    parser.add_argument("--examples", type=int, help="tokens that all questions share; a question has 80 to 160 more")
    parser.add_argument("--prompts", type=int, help="texts to continue, of 64 to 128 tokens")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, default=40, help="start no further run of a task after this time")
    parser.add_argument("--batch-size", type=int, default=8, help="of hf_quant and hf")
    parser.add_argument("--only", choices=("choices", "generation"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("engine", nargs="*", metavar="ENGINE_ARG=VALUE")
    options = parser.parse_intermixed_args(argv)
    for name, value in (SMALL if options.small else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Sample:
    """Random questions and prompts for one model."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.options, self.random = options, random.Random(0)
        self.vocabulary = engine.vocabulary
        texts = {engine.text([i]).strip() for i in range(min(engine.vocabulary, 20000))}
        self.words = sorted(t for t in texts if t.isascii() and t.isalnum())
        self.encode = engine.encode

    def ids(self, least: int, most: int) -> list[int]:
        """Returns `least` to `most` random token ids; the first ids may be special tokens and are left out."""
        return [self.random.randrange(SPECIAL_IDS, self.vocabulary) for _ in range(self.random.randint(least, most))]

    def choices(self) -> list[tuple[None, list[int], list[int]]]:
        """Returns the harness' triples: no key, context, continuation."""
        examples = self.ids(self.options.examples, self.options.examples)
        contexts = [examples + self.ids(80, 160) for _ in range(self.options.questions)]
        return [(None, context, self.ids(1, 12)) for context in contexts for _ in range(4)]

    def generation(self) -> list[str]:
        """Returns texts of random words."""
        if len(self.words) < 20:
            raise SystemExit(
                "the model's tokenizer has no words to write prompts with; leave generation out: --only choices"
            )
        prompts = []
        for _ in range(self.options.prompts):
            length, words = self.random.randint(64, 128), [self.random.choice(self.words)]
            while len(self.encode(" ".join(words))) < length:
                words += self.random.choices(self.words, k=8)
            prompts.append(" ".join(words))
        return prompts


def measure(
    ways: dict[str, Way], sample: Callable[[], Any], units: int, repeats: int, limit: float
) -> dict[str, list[float]]:
    """Returns units per second of each run of each way, the ways taking turns; the first turn is not counted.

    units: in one run, unless the way returns how many it made. limit: seconds after which no turn starts.
    """
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    begin, names = time.perf_counter(), list(ways)
    for turn in range(repeats + 1):
        if turn > 1 and time.perf_counter() - begin > limit:
            break
        first = turn % len(names)  # speed may drift: no way is always the first
        for name in names[first:] + names[:first]:
            prompts = sample()
            start = time.perf_counter()
            made = ways[name](prompts)
            if turn:
                speeds[name].append((made if isinstance(made, int) else units) / (time.perf_counter() - start))
    return speeds


def report(runs: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the medians, and the ratio of this project to each other way."""
    speed = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "runs": runs,
        "per_second": speed,
        "ours_over": {name: speed["ours"] / s for name, s in speed.items() if name != "ours"},
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    start = time.perf_counter()
    engine = ENGINES[options.adapter](
        options.model,
        options.new_tokens,
        options.batch_size,
        **engine_arguments(options.engine),
    )
    print(f"loaded in {time.perf_counter() - start:.1f} s", flush=True)
    sample = Sample(engine, options)
    tasks: dict[str, Any] = {}
    if options.only != "generation":
        requests = 4 * options.questions
        tasks["multiple_choice"] = report(
            measure(engine.choices(), sample.choices, requests, options.repeats, options.seconds)
        )
    if options.only != "choices":
        options.prompts = engine.most_prompts(options.prompts)
        tokens = options.prompts * options.new_tokens
        tasks["generation"] = report(
            measure(engine.generation(), sample.generation, tokens, options.repeats, options.seconds)
        )
    facts = engine.model.describe()
    sizes = {name: getattr(options, name) for name in FULL} | {"batch_size": options.batch_size}
    record = {
        "adapter": options.adapter, "model": facts.label, "device": facts.device, "kernel": facts.kernel,
        "engine": f"{facts.engine} {facts.engine_version}", "dtype": facts.dtype, "sizes": sizes, **tasks,
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(record, indent=1))
    print(f"\n{record['model']} in {record['engine']} on {record['device']}, kernel {record['kernel']}, {sizes}")
    for task, unit in (("multiple_choice", "requests/s"), ("generation", "tokens/s")):
        if task in tasks:
            print(f"{task:16} {unit:>12}  ours is")
            for name, speed in tasks[task]["per_second"].items():
                ratio = tasks[task]["ours_over"].get(name)
                print(f"  {name:14} {speed:12,.1f} {'' if ratio is None else f'{ratio:7.2f} ×'}")


if __name__ == "__main__":
    main()
