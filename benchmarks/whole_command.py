"""Times whole commands, from Enter to the figure: `lm_eval` and `compare run` against the engine's own bare script.

    python benchmarks/whole_command.py hf_quant DIR [--output FILE.json] [ENGINE_ARG=VALUE …]
    python benchmarks/whole_command.py llamacpp FILE.gguf
    python benchmarks/whole_command.py vllm_nvfp4 DIR --windows 20 --length 2048 --only ours,bare

Every way is a process of its own, timed from its start to its end; the ways take turns. Prints medians of the wall
time, and of the CPU time (user + system, children included), which other work on the machine changes less.

bare      a script of 20 lines: load the model in the engine, score the same windows, print the perplexity
ours      `lm_eval run --model` with our model
stock     the same with the harness' own model of that engine; llama.cpp has none that runs in process
single    N commands of `ours`, one after another
compare   one `compare run` over N models

Model arguments go to every way; vLLM runs eager in the bare script. The N models are one checkpoint with N seeds of the
harness, which change no figure here and make N results of it. All ways must find the same perplexity, within 2 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from benchmarks.common import engine_arguments
from lmeval_ext.tasks.corpus import SAMPLE

ROOT = Path(__file__).resolve().parents[1]
TASK = "text_strided"
TOLERANCE = 0.02  # of perplexities; 16-bit kernels round differently in batches of other sizes

_WINDOWS = """
import json, math, sys
model, text, length, stride, count, arguments = json.loads(sys.argv[1])
rows = [line if line.strip() else "" for line in open(text, newline="\\n")]
cut = lambda ids: [ids[i * stride : i * stride + length] for i in range(count)]
"""
BARE_HF = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
device = "cuda" if torch.cuda.is_available() else "cpu"
model_ = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **arguments}).to(device).eval()
windows = cut(AutoTokenizer.from_pretrained(model)("\\n\\n".join(rows)).input_ids)
total = 0.0
for window in windows:
    ids = torch.tensor([window], device=device)
    with torch.no_grad():
        logits = model_(ids).logits[0, :-1].float()
    total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
print(math.exp(total / sum(len(window) - 1 for window in windows)))
"""
BARE_VLLM = """
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model, **{"enforce_eager": True, "max_model_len": length + 1, **arguments})
    windows = cut(llm.get_tokenizer()("\\n\\n".join(rows)).input_ids)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": window} for window in windows], params)
    scores = [
        entry[token].logprob
        for window, output in zip(windows, outputs)
        for token, entry in zip(window[1:], output.prompt_logprobs[1:])
    ]
    print(math.exp(-sum(scores) / len(scores)))
"""
BARE_LLAMACPP = """
import numpy as np
from llama_cpp import Llama
llm = Llama(model, **{"n_ctx": length, "logits_all": True, "verbose": False, **arguments})
windows = cut(llm.tokenize("\\n\\n".join(rows).encode()))
total = 0.0
for window in windows:
    llm.reset()
    llm.eval(window)
    logits = llm.scores[: length - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    total += float((np.log(np.exp(logits).sum(axis=1)) - logits[range(length - 1), window[1:]]).sum())
print(math.exp(total / sum(len(window) - 1 for window in windows)))
"""


@dataclass(frozen=True)
class Engine:
    """One engine: the harness' own model of it, if any, the bare script, and arguments that both of `lm_eval` get."""

    stock: str | None
    bare: str
    context: str = "max_length"


ENGINES = {
    "hf_quant": Engine("hf", BARE_HF),
    "vllm_nvfp4": Engine("vllm", BARE_VLLM, "max_model_len"),
    "llamacpp": Engine(None, BARE_LLAMACPP),
}


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, and the perplexities that it found."""

    wall: float
    cpu: float
    perplexities: tuple[float, ...]

    @classmethod
    def sum(cls, runs: Sequence[Run]) -> Run:
        """Runs that followed each other."""
        found = tuple(value for run in runs for value in run.perplexities)
        return cls(sum(run.wall for run in runs), sum(run.cpu for run in runs), found)


def timed(command: Sequence[str], output: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command whose output goes to a file. Ends this program if the command fails."""
    with output.open("wb") as stream:
        start = time.perf_counter()
        pid = os.posix_spawn(
            command[0],
            list(command),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, stream.fileno(), 1), (os.POSIX_SPAWN_DUP2, stream.fileno(), 2)],
        )
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)[:300]}\n{output.read_text(errors='replace')[-3000:]}")
    return wall, usage.ru_utime + usage.ru_stime


def printed_perplexity(log: str) -> float:
    """Returns the last line that is a number: engines may print after the bare script's own last line."""
    for line in reversed(log.splitlines()):
        try:
            return float(line)
        except ValueError:
            continue
    sys.exit(f"The bare script printed no perplexity:\n{log[-3000:]}")


class Commands:
    """The ways to score one model's windows, each a function that runs it once."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.count = options, folder, 0
        self.engine = ENGINES[options.adapter]
        self.arguments = engine_arguments(options.engine)
        # vLLM needs one position more than the window
        context = {self.engine.context: options.length + (self.engine.context == "max_model_len")}
        self.model_args = {"pretrained": options.model, **context, **self.arguments}
        self.metadata = {
            "text_path": str(options.text), "eval_len": options.length, "stride": options.stride,
            "max_rows": options.windows,
        }  # fmt: skip

    def ways(self) -> dict[str, Callable[[], Run]]:
        ways: dict[str, Callable[[], Run]] = {
            "bare": self.bare,
            "ours": lambda: self.lm_eval(self.options.adapter),
            "single": lambda: Run.sum([self.lm_eval(self.options.adapter, seed) for seed in self.seeds]),
            "compare": self.compare,
        }
        stock = self.engine.stock
        if stock is not None:
            ways["stock"] = lambda: self.lm_eval(stock)
        return {name: way for name, way in ways.items() if name in self.options.only}

    @property
    def seeds(self) -> range:
        return range(1, self.options.models + 1)

    def new_folder(self) -> Path:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return folder

    def bare(self) -> Run:
        folder, o = self.new_folder(), self.options
        script = folder / "bare.py"
        script.write_text(_WINDOWS + self.engine.bare)
        text = json.dumps([o.model, str(o.text), o.length, o.stride, o.windows, self.arguments])
        wall, cpu = timed([sys.executable, str(script), text], folder / "log")
        return Run(wall, cpu, (printed_perplexity((folder / "log").read_text(errors="replace")),))

    def lm_eval(self, model: str, seed: int = 0) -> Run:
        folder = self.new_folder()
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", json.dumps(self.model_args),
            "--tasks", TASK, "--metadata", json.dumps(self.metadata), "--seed", str(seed),
            "--output_path", str(folder / "results.json"),
        ]  # fmt: skip
        return Run(*timed(command, folder / "log"), _perplexities(folder))

    def compare(self) -> Run:
        folder, o = self.new_folder(), self.options
        entries = [
            {"model": o.adapter, "args": self.model_args, "label": f"seed {i}", "options": {"seed": str(i)}}
            for i in self.seeds
        ]
        data = {"tasks": [TASK], "metadata": self.metadata}
        for name, content in (("models", entries), ("data", data)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        command = [
            sys.executable, "-m", "compare", "run", "-m", str(folder / "models.json"), "-d", str(folder / "data.json"),
            "--results", str(folder / "results"),
        ]  # fmt: skip
        run = Run(*timed(command, folder / "log"), _perplexities(folder / "results"))
        assert len(run.perplexities) == o.models, (folder / "log").read_text()
        return run


def _perplexities(folder: Path) -> tuple[float, ...]:
    results = [json.loads(file.read_bytes()) for file in folder.rglob("results_*.json")]
    return tuple(result["results"][TASK]["token_perplexity,none"] for result in results)


def check_same(runs: dict[str, list[Run]]) -> float:
    """The median perplexity of all runs. Ends this program where one differs: it has measured something else."""
    found = [value for way in runs.values() for run in way for value in run.perplexities]
    middle = statistics.median(found)
    for name, way in runs.items():
        for value in (value for run in way for value in run.perplexities):
            if not math.isclose(value, middle, rel_tol=TOLERANCE):
                sys.exit(f"{name} found a perplexity of {value}, the median of all ways is {middle}")
    return middle


def measure(commands: Commands) -> dict[str, list[Run]]:
    """All runs of all ways, in turn; each turn starts with another way."""
    ways = commands.ways()
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(commands.options.repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(ways[name]())
            print(f"{name:8} {runs[name][-1].wall:7.1f} s wall, {runs[name][-1].cpu:7.1f} s CPU", flush=True)
    return runs


# what is divided by what, and the limit that the project promises
RATIOS = {"ours_over_bare": ("ours", "bare"), "ours_over_stock": ("ours", "stock"),
          "compare_over_single": ("compare", "single")}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=ENGINES)
    parser.add_argument("model", help="checkpoint folder, or GGUF file")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="raw text file (default: the bundled sample)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--stride", type=int, default=512, help="tokens from one window's begin to the next one's")
    parser.add_argument("--models", type=int, default=8, metavar="N", help="of `compare` and `single`")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way")
    ways = ("bare", "ours", "stock", "single", "compare")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=ways, metavar="WAY,WAY", help="these alone"
    )
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument("engine", nargs="*", metavar="ENGINE_ARG=VALUE", help="arguments of the model")
    options = parser.parse_intermixed_args(argv)
    if unknown := set(options.only) - set(ways):
        parser.error(f"--only: no way {', '.join(sorted(unknown))}; expected some of {', '.join(ways)}")
    options.model = str(Path(options.model).absolute()) if Path(options.model).exists() else options.model
    options.text = options.text.absolute()
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    # the processes import this checkout, as this one does
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="whole-command-") as folder:
        runs = measure(Commands(options, Path(folder)))
    perplexity = check_same(runs)
    medians = {
        clock: {name: statistics.median(getattr(run, clock) for run in way) for name, way in runs.items()}
        for clock in ("wall", "cpu")
    }
    record: dict[str, Any] = {
        "adapter": options.adapter, "model": Path(options.model).name, "engine": _engine_version(options.adapter),
        "arguments": engine_arguments(options.engine), "machine": _machine(), "perplexity": perplexity,
        "windows": options.windows, "length": options.length, "stride": options.stride, "models": options.models,
    }  # fmt: skip
    for clock, figures in medians.items():
        ratios = {name: figures[a] / figures[b] for name, (a, b) in RATIOS.items() if {a, b} <= figures.keys()}
        record[clock] = {
            "seconds": figures, "ratios": ratios,
            "runs": {name: [getattr(run, clock) for run in way] for name, way in runs.items()},
        }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(record, indent=1))
    print(f"\n{record['model']} in {record['engine']}, {options.windows} windows of {options.length} tokens, "
          f"perplexity {perplexity:.4f}, {options.models} models; {record['machine']}")  # fmt: skip
    print(f"{'':20} {'wall s':>8} {'CPU s':>8}   medians of {options.repeats}")
    for name in runs:
        print(f"{name:20} {medians['wall'][name]:8.1f} {medians['cpu'][name]:8.1f}")
    for name in record["wall"]["ratios"]:
        print(f"{name:20} {record['wall']['ratios'][name]:8.2f} {record['cpu']['ratios'][name]:8.2f}")


def _engine_version(adapter: str) -> str:
    from compare.run.specs.engines import engine_version

    return engine_version(adapter)


def _machine() -> str:
    """``"NVIDIA H100, 16 cores"``, or ``"2 cores"`` without a GPU."""
    import torch

    cores = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


if __name__ == "__main__":
    main()
