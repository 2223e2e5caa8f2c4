"""Replaces the harness' command line in tests: the same arguments, no engine, no start-up time.

Files beside a model's config.json decide how its run goes; none of them is part of the model's fingerprint:
`boom` (printed, then exit 1), `exit` (its number), `hang` (never ends), `silent` (ends well, writes nothing),
`fill` (writes until the disk is full), `half` (writes half a result file), `slow` (takes so many seconds), `forgetful`
(writes no reference), `leave` (leaves a child that holds $STUB_FIFO and never ends). Every run writes two lines to
$STUB_CALLS, at its beginning and at its end.

A reference store has one file per task here, beside a reference.json that names the model. Like the adapters, the stub
refuses a model whose tasks the store does not hold.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ARGUMENTS = sys.argv[1:]  # of the harness; stub_lm_eval sets them in a forked process


def option(name: str) -> str:
    return ARGUMENTS[ARGUMENTS.index(name) + 1]


def main() -> int:
    assert ARGUMENTS[0] == "run"
    args = json.loads(option("--model_args"))
    output = Path(option("--output_path"))
    model = Path(args["pretrained"])
    call = {"model": model.name, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "model_args": args}
    write_event(call | {"arguments": ARGUMENTS})
    print("Loading weights:  50%|#####     | 1/2 [00:00<00:00, 9.0it/s]", file=sys.stderr)
    print("Scoring windows (x):  25%|##5       | 5/20 [00:02<00:06,  2.50window/s]", file=sys.stderr, flush=True)
    if (model / "hang").exists():
        with Path(os.environ["STUB_FIFO"]).open("w") as alive:  # its reader reaches the end when this process is gone
            alive.write(f"{os.getpid()}\n")
            alive.flush()
            while True:
                signal.pause()
    if (model / "leave").exists():
        hold = "import os, signal; pipe = open(os.environ['STUB_FIFO'], 'w'); print('held', flush=True); signal.pause()"
        child = subprocess.Popen([sys.executable, "-S", "-c", hold], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        child.stdout.readline()
    if (model / "boom").exists():
        print((model / "boom").read_text())
        return 1
    if (model / "exit").exists():
        code = int((model / "exit").read_text())
        os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
    if (model / "slow").exists():
        time.sleep(float((model / "slow").read_text()))
    if "reference" in args and (missing := [t for t in tasks() if not stored(args["reference"], t).exists()]):
        print(f"lmeval-ext: error: reference={args['reference']}: holds no windows of {missing}; write them first")
        return 1
    if "save_reference" in args and not (model / "forgetful").exists():
        folder = Path(args["save_reference"])
        (folder / "windows").mkdir(parents=True, exist_ok=True)
        (folder / "reference.json").write_text(json.dumps({"model": model.name}))
        for task in tasks():
            stored(folder, task).write_text("")
    output.parent.mkdir(parents=True, exist_ok=True)
    if (model / "fill").exists():
        with output.with_name("big").open("wb", buffering=0) as big:
            while True:
                big.write(bytes(65536))
    if (model / "silent").exists():
        print("Could not save results aggregated: [Errno 28] No space left on device")
        return 0
    if "--log_samples" in ARGUMENTS:
        for task in tasks():
            output.with_name(f"samples_{task}_2026-01-01.jsonl").write_text("{}\n")
    text = json.dumps(result(args))
    output.with_name("results_2026-01-01.json").write_text(text[:100] if (model / "half").exists() else text)
    write_event({"ended": model.name})
    return 0


def write_event(line: dict[str, object]) -> None:
    with Path(os.environ["STUB_CALLS"]).open("a") as calls:
        calls.write(f"{json.dumps(line)}\n")


def tasks() -> list[str]:
    return option("--tasks").split(",")


def stored(folder: str | Path, task: str) -> Path:
    return Path(folder) / "windows" / task


def result(args: dict[str, object]) -> dict[str, object]:
    bits = float((Path(str(args["pretrained"])) / "bits").read_text())
    measured = {"kld,none": 0.1 / bits, "kld_stderr,none": 0.0005} if "reference" in args else {}
    figures = {"token_perplexity,none": 30 / bits, "token_perplexity_stderr,none": 0.25, **measured}
    return {
        "results": {t: {"alias": t, **figures} for t in tasks()},
        "configs": {t: {"metadata": {"protocol": "exllama", "tokens_sha256": "ab", "eval_len": 64}} for t in tasks()},
        "config": {
            "model": option("--model"),
            "model_args": args,
            "quantization": {
                "label": args.get("label", "none"),
                "family": "NVFP4",
                "scheme": "nvfp4a16",
                "engine": "vllm",
                "layer_bpw": bits,
                "head_bpw": 16.0,
                "vram_gb": bits / 4,
                "tokens_per_second": 1234.5,
            },
        },
        "date": 1.7e9,
    }


if __name__ == "__main__":
    sys.exit(main())
