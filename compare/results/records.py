"""What a harness result file says, one `Record` a task: plain data, read with the standard library alone.

A number that a file does not hold, or that is not finite, is ``None``. Nothing is guessed here, nothing filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.families import FULL_PRECISION
from compare.metrics import from_reference
from compare.results.arithmetic import arithmetic_run, scheme_arithmetic
from compare.results.divergence import Divergence
from compare.results.groups import Tree
from compare.results.provenance import Run

PERPLEXITY = "token_perplexity"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a task. `value` and `stderr` are None where the file holds null, NaN or "N/A"."""

    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Quantization:
    """``config.quantization`` as our adapters write it; `known` is False for a stock model.

    Bits per weight: `layer_bpw` decoder matrices, `head_bpw` output matrix, `file_bpw` all tensors of the file.
    `vram_gb` is (layer + head bits) / 8 / 1024³; `weight_bytes` counts every tensor; `layer_parameters` the weights of
    the decoder's matrices; `kv_bytes_per_token` one token in a KV cache of `kv_cache_dtype`. `nan_loglikelihoods`: so
    many answers of this run were no numbers, from which the harness makes accuracies all the same.
    """

    known: bool = False
    family: str = "unknown"
    scheme: str = ""
    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = None
    file_bpw: float | None = None
    weight_bytes: int | None = None
    layer_parameters: int | None = None
    kv_bytes_per_token: int | None = None
    kv_cache_dtype: str = ""
    engine: str = ""
    engine_version: str = ""
    kernel: str | None = None
    dtype: str = ""
    device: str = ""
    revision: str = ""
    scoring: str = ""
    tokens_per_second: float | None = None
    peak_vram_gb: float | None = None
    kv_pool_gb: float | None = None
    nan_loglikelihoods: int = 0
    notes: tuple[str, ...] = ()

    @property
    def arithmetic(self) -> str:
        """What met the weights: 16-bit or quantized activations, as really run."""
        return arithmetic_run(self.scheme, self.kernel, self.notes)

    @property
    def runs_other_than_named(self) -> bool:
        """A checkpoint with quantized activations that ran weight-only: its number is not the format's."""
        return self.arithmetic != scheme_arithmetic(self.scheme)


@dataclass(frozen=True, slots=True)
class ProtocolRecord:
    """Which tokens a number is over. Two numbers compare only if `fingerprint` is equal."""

    name: str = ""
    eval_len: int | None = None
    stride: int | None = None
    windows: int | None = None
    scored_tokens: int | None = None
    tokens_sha256: str | None = None
    text: str = ""
    tokenizer: str = ""
    # For tasks without token windows: task version, samples really used, few-shot examples.
    harness: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> tuple[str, ...]:
        if self.tokens_sha256:
            return (self.name, self.tokens_sha256)
        if self.name:
            sizes = (self.eval_len, self.stride, self.windows, self.scored_tokens)
            return (self.name, "no fingerprint", *map(str, sizes))
        return self.harness

    def describe(self) -> str:
        """``20 windows × 2048 tokens, stride 512, exllama``; empty if nothing is known."""
        size = f"{self.windows} × {self.eval_len} tokens" if self.windows and self.eval_len else ""
        stride = f"stride {self.stride}" if self.stride else ""
        return ", ".join(part for part in (size, stride, f"{self.name} protocol" if self.name else "") if part)


@dataclass(frozen=True, slots=True)
class Record:
    """One model on one task."""

    label: str
    task: str
    metrics: dict[str, Metric] = field(hash=False)
    quantization: Quantization = Quantization()
    protocol: ProtocolRecord = ProtocolRecord()
    colour: str | None = None
    model: str = ""
    checkpoint: str = ""
    run: Run = field(default_factory=Run, hash=False)
    date: float = 0.0
    file: Path = Path()
    alias: str = ""  # the task's name in the harness' own table
    groups: Tree = field(default_factory=dict, hash=False)  # of the file: direct subtasks by group
    reference: bool = False  # a spec says that others are to be measured against it
    divergence: Divergence | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two records the same model on the same task: the later one is then a re-run.

        The checkpoint counts by its name, not its folder: a re-run from elsewhere is one still.
        """
        q = self.quantization
        return (self.task, self.label, self.checkpoint, q.family, q.scheme, q.engine or self.model, q.arithmetic)

    @property
    def is_reference(self) -> bool:
        return self.reference or self.quantization.family == FULL_PRECISION

    def comparability(self, metric: str) -> tuple[str, ...]:
        """What a figure of this metric is over; two figures compare only if it is equal.

        For a divergence that is the stored reference too. Where a file does not name it, it is no other file's.
        """
        if not from_reference(metric):
            return self.protocol.fingerprint
        known = self.divergence.reference.id if self.divergence is not None else ""
        return (*self.protocol.fingerprint, f"reference {known or f'not named in {self.file}'}")

    def metric(self, key: str) -> Metric:
        return self.metrics.get(key) or Metric(None)

    def extra(self) -> dict[str, Any]:
        """The engine's own figures, for the JSON table."""
        q = self.quantization
        return {
            "tokens_per_second": q.tokens_per_second,
            "peak_vram_gb": q.peak_vram_gb,
            "kv_pool_gb": q.kv_pool_gb,
        }
