"""Builds result files as the harness writes them, from a few arguments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compare.cli import main

Content = dict[str, Any]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def quantization(label: str, family: str, scheme: str, bpw: float | None, **changes: Any) -> Content:
    """``config.quantization`` with the sizes of a Llama-like model of 8 billion weights."""
    decoder, head, embedding = 6_979_321_856, 525_336_576, 525_336_576
    sized = bpw is not None
    bits = 0 if bpw is None else bpw * decoder + 6.0 * head
    block: Content = {
        "label": label,
        "family": family,
        "scheme": scheme,
        "layer_bpw": bpw,
        "head_bpw": 6.0 if sized else None,
        "vram_gb": bits / 8 / 1024**3 if sized else None,
        "file_bpw": (bits + 16 * embedding) / (decoder + head + embedding) if sized else None,
        "weight_bytes": int((bits + 16 * embedding) / 8) if sized else None,
        "layer_parameters": decoder if sized else None,
        "kv_bytes_per_token": 131_072 if sized else None,  # 32 layers, 8 KV heads of 128, two bytes
        "kv_cache_dtype": "bfloat16" if sized else None,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "kernel": None,
        "dtype": "bfloat16",
        "device": "cpu",
        "revision": None,
        "scoring": "float32",
        "tokens_per_second": 1234.5,
        "peak_vram_gb": None,
        "kv_pool_gb": None,
        "notes": ["peak_vram_gb: no GPU"],
    }
    block.update(changes)
    return block


def result(
    label: str = "model",
    family: str = "GGUF",
    scheme: str = "Q4_K_M",
    bpw: float | None = 4.85,
    ppl: float | None = 8.5,
    stderr: float | str | None = 0.11,
    *,
    task: str = "wiki2_strided",
    protocol: str = "exllama",
    tokens: str = "main",
    windows: int = 20,
    date: float = 1_790_000_000.0,
    quantized: bool = True,
    **changes: Any,
) -> Content:
    """The content of one result file. Remaining keywords change ``config.quantization``."""
    eval_len, stride = 2048, 512
    name = label.replace(" ", "-") or "model"
    config: Content = {
        "model": "vllm_nvfp4",
        "model_args": {"pretrained": f"models/{name}", "dtype": "bfloat16"},
        "batch_size": "auto",
        "limit": None,
    }
    if quantized:
        config["quantization"] = quantization(label, family, scheme, bpw, **changes)
    return {
        "results": {
            task: {
                "alias": task,
                "name": task,
                "sample_len": windows,
                "token_perplexity,none": ppl,
                "token_perplexity_stderr,none": stderr,
                "token_perplexity_stderr_stderr,none": "N/A",
                "top1_accuracy,none": 0.52,
                "top1_accuracy_stderr,none": 0.004,
            }
        },
        "configs": {
            task: {
                "task": task,
                "metadata": {
                    "version": 1.0,
                    "protocol": protocol,
                    "eval_len": eval_len,
                    "stride": stride,
                    "max_rows": windows,
                    "windows": windows,
                    "scored_tokens": windows * (eval_len - 1),
                    "distinct_tokens": eval_len + stride * (windows - 1),
                    "tokens_sha256": sha(tokens),
                    "text_sha256": sha("text"),
                    "text": "Salesforce/wikitext wikitext-2-raw-v1 test",
                    "tokenizer": "models/base",
                    "bos": "tokenizer",
                    "blank_rows": "keep",
                    "warmup_tokens": 0,
                    "nonfinite_logprobs": 0,
                    "standard_error": {"method": "block bootstrap", "block_windows": 4, "blocks": windows // 4},
                },
            }
        },
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"token_perplexity": False, "top1_accuracy": True}},
        "n-samples": {task: {"original": windows, "effective": windows}},
        "config": config,
        "date": date,
        "lm_eval_version": "0.4.13",
    }


class Folder:
    """A results folder, with methods that add files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def write(self, content: Content, name: str | None = None) -> Path:
        self._count += 1
        file = self.path / (name or f"m{self._count:03d}/results_2026-09-21T00-00-{self._count:03d}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2), encoding="utf-8")
        return file

    def add(self, *args: Any, **kwargs: Any) -> Path:
        return self.write(result(*args, **kwargs))

    def raw(self, name: str, data: bytes) -> Path:
        file = self.path / name
        file.write_bytes(data)
        return file


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> list[Content]:
        return json.loads(self.out)

    def by_label(self) -> dict[str, Content]:
        return {record["label"]: record for record in self.json}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    path = tmp_path / "results"
    path.mkdir()
    return Folder(path)


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``compare ARGS…`` in this process; returns exit code, stdout and stderr."""

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


BLANK = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 460"/>'


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --fast, every picture is blank: for tests of messages, or of the text around pictures."""
    if not request.config.getoption("--fast"):
        return
    from compare.plot import figure
    from compare.report import pictures

    for module in (figure, pictures):
        monkeypatch.setattr(module, "render", lambda *_: BLANK)
    monkeypatch.setattr(pictures, "render_svg", lambda *_: (BLANK, []))


LADDERS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "EXL2": (("2.25", 2.25, 14.9), ("3.0", 3.0, 9.9), ("4.0", 4.0, 8.55), ("5.0", 5.0, 8.28), ("6.0", 6.0, 8.21)),
    "EXL3": (("2.0", 2.03, 12.1), ("2.5", 2.53, 10.1), ("3.0", 3.03, 9.05), ("4.0", 4.03, 8.39), ("5.0", 5.03, 8.24)),
    "GGUF": (
        ("Q2_K", 2.96, 11.4),
        ("Q3_K_M", 3.72, 9.2),
        ("Q4_K_M", 4.79, 8.44),
        ("Q5_K_M", 5.61, 8.29),
        ("Q6_K", 6.56, 8.22),
    ),
    "VPTQ": (("2.3", 2.3, 11.6), ("2.6", 2.6, 10.6), ("3.0", 3.02, 9.6), ("3.5", 3.5, 9.0), ("4.0", 4.02, 8.5)),
    "NVFP4": (("A16", 4.50, 8.62),),
}


def fill_with_ladders(folder: Folder, per_family: int = 5) -> None:
    """Adds five families, as in comparisons that people share, and the full-precision baseline."""
    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.17, 0.10)
    for family, steps in LADDERS.items():
        for scheme, bpw, ppl in steps[:per_family]:
            folder.add(f"{family} {scheme}", family, scheme, bpw, ppl, 0.012 * ppl)
    folder.add("NVFP4 W4A4", "NVFP4", "nvfp4", 4.501, 8.93, 0.11, kernel="EmulationNvFp4LinearKernel")
