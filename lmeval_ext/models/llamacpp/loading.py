"""Finds a GGUF file, checks that llama.cpp can score it, and loads it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.models.llamacpp.arguments import ALL_LAYERS, CHOICES, cache_block, count
from lmeval_ext.models.llamacpp.binding import ENGINE_VERSION, LoadMessages, captured, llama_cpp
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.foreign_gguf import not_a_model
from lmeval_ext.storage.gguf_checkpoint import read_gguf_checkpoint
from lmeval_ext.storage.gguf_header import GGUFHeader, read_gguf
from lmeval_ext.storage.measure import gguf_file, measure

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 8192  # the KV cache of a model's full context may need more memory than its weights
# llama_context_default_params: what "as the model has it" is to llama.cpp; `llama_cpp.Llama` passes values of its own
MODELS_OWN = {"yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}
# Kept in the file, but read by llama.cpp for few architectures (grok.cpp, mistral3.cpp); others get 32 and 1
YARN_RANGE = ("yarn_beta_fast", "yarn_beta_slow")
LEARNED_POSITIONS = "position_embd.weight"  # GPT-2, StarCoder: one row per position (llama-arch.cpp)


def find_gguf(pretrained: str) -> str:
    """Returns the GGUF file: `pretrained` itself, or the only one (or the first part) in a folder.

    Raises UserError if there is none, or several.
    """
    path = Path(pretrained).expanduser()
    if not path.exists():
        raise UserError(f"pretrained={pretrained!r}: no such file; give a .gguf file, or its folder")
    file = gguf_file(path)
    if file is None:
        kind = "holds safetensors too, or no GGUF file" if path.is_dir() else "is not a GGUF file"
        raise UserError(f"pretrained={pretrained!r} {kind}; name a .gguf file (llama.cpp's converter makes them)")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"pretrained={str(file)!r} is not a GGUF file; convert it with llama.cpp's converter")
    return str(file)


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF model's header says, with overrides applied.

    metadata: by key without the architecture's prefix. tensors: names of all tensors, in all parts of a split file.
    """

    path: str
    architecture: str
    metadata: dict[str, Any]
    tensors: frozenset[str]

    @classmethod
    def read(cls, path: str, overrides: dict[str, Any] | None = None) -> GGUFModel:
        """Reads the header. overrides: metadata that the user replaces (kv_overrides).

        Raises UserError for a file that is damaged or holds no model.
        """
        try:
            header = read_gguf(Path(path))
            kind = not_a_model(header.metadata)
            if kind:
                raise UserError(f"{path!r} is not a model: it holds {kind}; give the GGUF file of the model")
            _check_layers(header)
            tensors = frozenset(weight.name for weight in read_gguf_checkpoint(Path(path))[0])
        except StorageError as reason:
            raise UserError(f"llama.cpp could not load {path!r}: {reason}") from reason
        metadata = header.metadata | (overrides or {})
        architecture = str(metadata.get("general.architecture"))
        return cls(path, architecture, {k.removeprefix(f"{architecture}."): v for k, v in metadata.items()}, tensors)

    def integer(self, key: str) -> int | None:
        """Returns a whole number of the metadata; None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def trained_context(self) -> int | None:
        """Tokens of the context that the model was trained for."""
        return self.integer("context_length")

    def rotary(self) -> dict[str, float]:
        """Arguments of `llama_cpp.Llama` with which llama.cpp computes with the rotary parameters of the file."""
        stored = {name: self.metadata.get(f"rope.scaling.{name}") for name in YARN_RANGE}
        return MODELS_OWN | {name: float(value) for name, value in stored.items() if isinstance(value, (int, float))}

    def head_dimension(self, kind: str) -> int | None:
        """Values per head of the cached keys (kind "key") or values ("value"), as in llama-model.cpp."""
        heads, width = self.integer("attention.head_count"), self.integer("embedding_length")
        return self.integer(f"attention.{kind}_length") or (width // heads if heads and width else None)

    def check(self, arguments: dict[str, Any], context: int) -> None:
        """Raises UserError for a model or arguments on which llama.cpp gives wrong scores, or aborts this process.

        arguments: those of `arguments.translated`. context: tokens of the context.
        """
        if self.metadata.get("attention.causal") is False and "attention_type" not in arguments:
            raise UserError(
                f"{self.path!r} is a model whose tokens attend to later ones (attention.causal is false): it makes "
                "embeddings, and has no probability of a next token; choose a causal language model"
            )
        for argument, kind in (("type_k", "key"), ("type_v", "value")):
            block, values = cache_block(arguments.get(argument)), self.head_dimension(kind)
            if block > 1 and values is None and self.integer("attention.head_count") != 0:  # 0: no attention
                raise UserError(
                    f"{argument}={_word(argument, arguments[argument])}: the header of {self.path!r} does not say how "
                    f"many values a head has, and llama.cpp aborts where blocks of {block} do not divide them; use "
                    "f16, bf16 or f32"
                )
            if block > 1 and values and values % block:
                name = _word(argument, arguments[argument])
                raise UserError(
                    f"{argument}={name}: its blocks of {block} do not divide the {values} values of a head of "
                    f"{self.path!r}; use f16, bf16 or f32"
                )
        trained = self.trained_context
        if LEARNED_POSITIONS in self.tensors and trained and context > trained:
            raise UserError(
                f"max_length={context}: {self.path!r} has a learned embedding for each of {trained} positions and "
                f"none beyond; use max_length={trained} at most"
            )


def _word(argument: str, value: int) -> str:
    return next((word for word, number in CHOICES[argument].items() if number == value), str(value))


def _check_layers(header: GGUFHeader) -> None:
    """Raises UserError for a number of layers that would make llama.cpp abort this process."""
    layers = header.integer(f"{header.metadata.get('general.architecture')}.block_count")
    if layers is None:
        return
    tensors = len(header.tensors) if (header.integer("split.count") or 1) == 1 else 0  # 0: unknown, the file is split
    if layers < 1 or layers > tensors > 0:  # every layer has a tensor
        raise UserError(
            f"{str(header.path)!r} declares {layers} layers, but holds {len(header.tensors)} tensors: its header is "
            "damaged; download the file again"
        )


def load_vocabulary(path: str) -> Any:
    """Returns a `llama_cpp.Llama` without weights. Raises UserError with the likely cause if it cannot be loaded."""
    llama, messages = _load(path, False, vocab_only=True)
    _warn(path, [line for line in messages.warnings() if "n_ctx_seq" not in line])  # its context is never used
    return llama


def load_model(path: str, verbose: bool, **arguments: Any) -> tuple[Any, list[str]]:
    """Loads a model. Returns the `llama_cpp.Llama` and llama.cpp's warnings, which are logged too.

    arguments: those of `arguments.translated`. Raises UserError with the likely cause if it cannot be loaded, and for
    a model that does not predict a next token.
    """
    flash = arguments.pop("flash_attn", llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    # `llama_cpp.Llama` 0.3.36 knows on and off only, and puts this constant for on
    constants = mock.patch.object(llama_cpp.llama_cpp, "LLAMA_FLASH_ATTN_TYPE_ENABLED", flash)
    with constants:
        off = flash == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        llama, messages = _load(path, verbose, flash_attn=not off, **arguments)
    if llama.context_params.flash_attn_type != flash:
        raise UserError(f"{ENGINE_VERSION} does not take flash_attn={_word('flash_attn', flash)}; use on or off")
    if llama_cpp.llama_get_memory(llama.ctx) is None or llama_cpp.llama_model_has_encoder(llama.model):
        name = llama.metadata.get("general.architecture")
        raise UserError(
            f"{path!r} is a {name!r} model, which has no probability of a next token given those before (an encoder, "
            "an embedding or a diffusion model); choose a causal language model"
        )
    warnings = [line for line in messages.warnings() if not _of_rounding(line, arguments.get("n_ctx"))]
    _warn(path, warnings)
    return llama, warnings


def _of_rounding(line: str, context: int | None) -> bool:
    """Whether a warning of a context beyond the trained one comes from llama.cpp's rounding up of `context` alone."""
    sizes = re.search(r"n_ctx_seq \((\d+)\) > n_ctx_train \((\d+)\)", line)
    return bool(sizes and context and context <= int(sizes[2]))


_warned: set[tuple[str, str]] = set()  # the vocabulary of a model may be loaded several times


def _warn(path: str, warnings: list[str]) -> None:
    """Logs llama.cpp's warnings, each once per file."""
    for line in warnings:
        if (path, line) not in _warned:
            _warned.add((path, line))
            logger.warning("llama.cpp warns of %s: %s", path, line)


def _load(path: str, verbose: bool, **arguments: Any) -> tuple[Any, LoadMessages]:
    with captured(verbose) as messages:
        try:
            return llama_cpp.Llama(model_path=path, verbose=verbose, **arguments), messages
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp could not load {path!r}: {_cause(path, error, messages.errors())}") from error


def _cause(path: str, error: Exception, errors: list[str]) -> str:
    """Returns what our own reader finds wrong with the file; otherwise llama.cpp's message and the likely causes.

    errors: what llama.cpp logged; the first line is the cause, others say where it led to.
    """
    try:
        measure(Path(path))
    except StorageError as reason:
        return str(reason)
    said = errors[0] if errors else first_line(error)
    return (
        f"{said}; the file may be damaged or of an architecture that {ENGINE_VERSION} does not know, or "
        "memory is short; lower n_ctx or n_gpu_layers, and run with verbose=True for llama.cpp's own messages"
    )


def set_layers_on_gpu(arguments: dict[str, Any], device: str | None) -> bool:
    """Sets the default of n_gpu_layers in `arguments`; returns whether any layers are on a GPU.

    Raises UserError if device=cpu contradicts n_gpu_layers.
    """
    gpu = bool(llama_cpp.llama_supports_gpu_offload()) and device != "cpu"
    layers = arguments.setdefault("n_gpu_layers", ALL_LAYERS if gpu else 0)
    if device == "cpu" and layers:
        raise UserError(f"device=cpu and n_gpu_layers={layers} contradict each other; drop one")
    return gpu and layers != 0


def context_size(trained: int | None, max_length: Any, n_ctx: Any) -> int:
    """Returns the context in tokens: max_length or n_ctx; by default the model's own, at most DEFAULT_CONTEXT.

    trained: the model's own context, which n_ctx=0 asks for; None: unknown. Raises UserError if both are given and
    differ, and for anything but a whole number.
    """
    sizes = {name: count(name, v, 0) for name, v in (("max_length", max_length), ("n_ctx", n_ctx)) if v is not None}
    if len(set(sizes.values())) > 1:
        raise UserError(f"max_length={max_length} and n_ctx={n_ctx} are two names of one argument; give one")
    if not sizes:
        return min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    size = next(iter(sizes.values())) or trained
    if not size:
        raise UserError(f"{next(iter(sizes))}=0: the GGUF file names no context; give a number of tokens")
    return size
