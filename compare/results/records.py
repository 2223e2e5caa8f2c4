"""The content of harness result files, one `Record` per task: plain data, standard library only.

A number that a file lacks, or that is not finite, is ``None``. Nothing is guessed or filled in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.families import FULL_PRECISION
from compare.metrics import needs_reference
from compare.results.arithmetic import arithmetic_run, scheme_arithmetic
from compare.results.divergence import Divergence
from compare.results.groups import Tree
from compare.results.positions import Positions
from compare.results.provenance import Run

UNSTATED = "unknown how its weights are stored: a stock model's result file does not say"
QUANTIZED_BY = "; quantized by "  # after UNSTATED, before what indicates it
TOLD = "told by the spec, not measured"
_CAVEATS = (UNSTATED, TOLD)  # how the notes begin that stand beside every table and picture


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One figure of a task. `value` and `stderr` are None where the file has null, NaN or "N/A"."""

    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """Bytes of a KV cache as a function of the context.

    groups: bytes per token, and the window in tokens (None: all tokens are kept). state_bytes: what does not grow.
    upper_bound: the cache takes at most so much.
    """

    groups: tuple[tuple[int, int | None], ...]
    state_bytes: int = 0
    upper_bound: bool = False

    def bytes_at(self, context: int) -> int:
        """The bytes for one sequence of `context` tokens."""
        return self.state_bytes + sum(
            size * (context if window is None else min(context, window)) for size, window in self.groups
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """``config.quantization`` as our adapters write it; `known` is False for a stock model.

    Bits per weight: `layer_bpw` decoder matrices, `head_bpw` output matrix, `file_bpw` all tensors of the file.
    `vram_gb` is (layer + head bits) / 8 / 1024³; `weight_bytes` counts every tensor, of which `draft_bytes` belong to
    draft layers that no engine loads; `layer_parameters` the weights of the decoder's matrices; `architecture` its name
    in config.json, "" if unknown (also of GGUF files, whose names are others). `kv_bytes_per_token`: one token in a KV
    cache of `kv_cache_dtype`, where all tokens take the same; `kv_cache`: its size at any context.
    `nan_loglikelihoods`: how many log-likelihoods of this run were NaN, from which the harness computes accuracies all
    the same.
    """

    known: bool = False
    family: str = "unknown"
    scheme: str = ""
    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = None
    file_bpw: float | None = None
    weight_bytes: int | None = None
    draft_bytes: int = 0
    layer_parameters: int | None = None
    architecture: str = ""
    kv_bytes_per_token: int | None = None
    kv_cache: KVCacheSize | None = None
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
        """`WEIGHT_ONLY` or `ACTIVATIONS`, as the model really ran."""
        return arithmetic_run(self.scheme, self.kernel, self.notes)

    @property
    def caveats(self) -> tuple[str, ...]:
        """The notes on what the result file does not say, or the user said in its place."""
        return tuple(note for note in self.notes if note.startswith(_CAVEATS))

    @property
    def looks_quantized(self) -> bool:
        """Whether arguments or name of a stock model indicate quantization."""
        return any(note.startswith(UNSTATED + QUANTIZED_BY) for note in self.notes)

    @property
    def runs_other_than_named(self) -> bool:
        """Whether a checkpoint with quantized activations ran weight-only: its figure is not the format's."""
        return self.arithmetic != scheme_arithmetic(self.scheme)


@dataclass(frozen=True, slots=True)
class ProtocolRecord:
    """The tokens that a figure is over. Two figures are comparable only if `fingerprint` is equal.

    harness: for tasks without token windows, the settings that decide the figure (`compare.results.settings`), as are
    configuration, task_hash and unknown: the settings that the file does not have.
    """

    name: str = ""
    eval_len: int | None = None
    stride: int | None = None
    windows: int | None = None
    scored_tokens: int | None = None
    tokens_sha256: str | None = None
    text: str = ""
    tokenizer: str = ""
    harness: tuple[str, ...] = ()
    configuration: str = ""
    task_hash: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def has_windows(self) -> bool:
        """Whether the figure is over token windows, which the task's metadata describes."""
        return bool(self.tokens_sha256 or self.name)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of settings that decide the figure and that the file does not have."""
        if self.tokens_sha256:
            return ()
        return ("checksum of the tokens",) if self.name else self.unknown

    @property
    def configured(self) -> tuple[str, ...]:
        """Digests of the task's configuration and prompts, for tasks without token windows."""
        if self.has_windows:
            return ()
        named = (("task configuration", self.configuration), ("task hash", self.task_hash))
        return tuple(f"{name} {digest}" for name, digest in named if digest)

    @property
    def fingerprint(self) -> tuple[str, ...]:
        if self.tokens_sha256:
            return (self.name, self.tokens_sha256)
        if self.name:
            sizes = (self.eval_len, self.stride, self.windows, self.scored_tokens)
            return (self.name, "no fingerprint", *map(str, sizes))
        return self.harness

    def describe(self) -> str:
        """``20 × 2048 tokens, stride 512, exllama protocol``; empty if nothing is known."""
        size = f"{self.windows} × {self.eval_len} tokens" if self.windows and self.eval_len else ""
        stride = f"stride {self.stride}" if self.stride else ""
        return ", ".join(part for part in (size, stride, f"{self.name} protocol" if self.name else "") if part)


@dataclass(frozen=True, slots=True)
class Record:
    """One model on one task.

    alias: the task's name in the harness' own table. groups: direct subtasks by group, of the whole file.
    baseline_by: who says that others are compared with this model, ``"--baseline"`` or ``"the spec"``. chosen_by: the
    model arguments that choose the weights and how they are loaded, the checkpoint's whole path among them.
    not_numbers: the figures of the whole run, ``"lambada_openai/perplexity"``, that are NaN or infinite.
    """

    label: str
    task: str
    metrics: dict[str, MetricValue] = field(hash=False)
    quantization: Quantization = Quantization()
    protocol: ProtocolRecord = ProtocolRecord()
    colour: str | None = None
    model: str = ""
    checkpoint: str = ""
    chosen_by: tuple[tuple[str, str], ...] = ()
    run: Run = field(default_factory=Run, hash=False)
    date: float = 0.0
    file: Path = Path()
    alias: str = ""
    groups: Tree = field(default_factory=dict, hash=False)
    baseline_by: str = ""
    not_numbers: tuple[str, ...] = ()
    divergence: Divergence | None = None
    positions: Positions | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for the same model on the same task: the later record is then a re-run.

        The checkpoint counts by its whole path: training runs have many folders of one name.
        """
        q = self.quantization
        chosen_by = [f"{name}={value}" for name, value in self.chosen_by]
        return (self.task, self.label, *chosen_by, q.family, q.scheme, q.engine or self.model, q.arithmetic, q.revision)

    @property
    def is_baseline(self) -> bool:
        """Whether others are compared with this model: the user says so, or its file that it is in full precision."""
        return bool(self.baseline_by) or self.quantization.family == FULL_PRECISION

    def comparability(self, metric: str) -> tuple[str, ...]:
        """What a figure of this metric is over; two figures are comparable only if it is equal.

        For a divergence this includes the stored reference. A setting or reference that the file does not name equals
        no other, not even another unknown one.
        """
        protocol = self.protocol
        unknown = (f"unknown in {self.file}",) if protocol.missing else ()
        key = (*protocol.fingerprint, *protocol.configured, *unknown)
        if not needs_reference(metric):
            return key
        identity = self.divergence.reference.id if self.divergence is not None else ""
        return (*key, f"reference {identity or f'not named in {self.file}'}")

    def scored_on(self, metric: str) -> str:
        """`comparability` for a reader: ``20 × 2048 tokens, stride 512, tokens 1a2b3c4d, reference BF16 in vllm``."""
        parts = [self.protocol.describe() or ", ".join(self.protocol.fingerprint), *self.protocol.configured]
        if self.protocol.tokens_sha256:
            parts.append(f"tokens {self.protocol.tokens_sha256[:8]}")
        if needs_reference(metric):
            named = self.divergence is not None and self.divergence.reference.id
            parts.append(
                f"reference {self.divergence.reference.describe() if self.divergence and named else 'not named'}"
            )
        if self.protocol.missing:
            parts.append(f"its file does not say: {', '.join(self.protocol.missing)}")
        return ", ".join(parts)

    def metric(self, key: str) -> MetricValue:
        return self.metrics.get(key) or MetricValue(None)

    def extra(self) -> dict[str, Any]:
        """The engine's own figures, for the JSON table."""
        q = self.quantization
        return {
            "tokens_per_second": q.tokens_per_second,
            "peak_vram_gb": q.peak_vram_gb,
            "kv_pool_gb": q.kv_pool_gb,
        }
