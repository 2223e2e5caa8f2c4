"""Finds a GGUF file, checks the arguments for llama.cpp, and loads it."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import Any

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.gguf_header import read_gguf
from lmeval_ext.storage.measure import gguf_file, measure

try:
    import llama_cpp
except ImportError as error:
    raise MissingEngineError(
        f"llamacpp needs llama-cpp-python ({first_line(error)}); install it with pip install 'lmeval-ext[gguf]'"
    ) from error

ENGINE_VERSION = f"llama-cpp-python {llama_cpp.__version__}"
DEFAULT_CONTEXT = 8192  # the KV cache of a model's full context may need more memory than its weights


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


_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, _user_data: Any) -> None:
    if level == _LOG_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def load_llama(path: str, verbose: bool = False, **arguments: Any) -> Any:
    """Returns a `llama_cpp.Llama`. Raises UserError with the likely cause if it cannot be loaded."""
    if not verbose:  # llama.cpp warns about every vocabulary that is loaded without its model
        llama_cpp.llama_log_set(_errors_only, None)
    _check_layers(path)
    try:
        return llama_cpp.Llama(model_path=path, verbose=verbose, **arguments)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"llama.cpp could not load {path!r}: {_cause(path, error)}") from error


def _check_layers(path: str) -> None:
    """Raises UserError for a number of layers that would make llama.cpp abort this process."""
    try:
        header = read_gguf(Path(path))
    except StorageError:
        return  # llama.cpp refuses it; `_cause` finds the reason
    layers = header.integer(f"{header.metadata.get('general.architecture')}.block_count")
    if layers is None:
        return
    tensors = len(header.tensors) if (header.integer("split.count") or 1) == 1 else 0  # 0: unknown, the file is split
    if layers < 1 or layers > tensors > 0:  # every layer has a tensor
        raise UserError(
            f"{path!r} declares {layers} layers, but holds {len(header.tensors)} tensors: its header is damaged; "
            "download the file again"
        )


def _cause(path: str, error: Exception) -> str:
    """Returns what our own reader finds wrong with the file; otherwise llama.cpp's message and the likely causes."""
    try:
        measure(Path(path))
    except StorageError as reason:
        return str(reason)
    return (
        f"{first_line(error)}; the file may be damaged or of an architecture that {ENGINE_VERSION} does not know, or "
        "memory is short; lower n_ctx or n_gpu_layers, and run with verbose=True for llama.cpp's own messages"
    )


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises UserError for a name that is not an argument of llama_cpp.Llama, which silently ignores such names."""
    known = [
        p.name for p in inspect.signature(llama_cpp.Llama.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise UserError(f"{name}={arguments[name]!r} is not an argument of llamacpp; {hint}")


def set_layers_on_gpu(arguments: dict[str, Any], device: str | None) -> bool:
    """Sets the default of n_gpu_layers in `arguments`; returns whether any layers are on a GPU.

    Raises UserError if device=cpu contradicts n_gpu_layers.
    """
    gpu = bool(llama_cpp.llama_supports_gpu_offload()) and device != "cpu"
    layers = int(arguments.setdefault("n_gpu_layers", -1 if gpu else 0))
    if device == "cpu" and layers:
        raise UserError(f"device=cpu and n_gpu_layers={arguments['n_gpu_layers']} contradict each other; drop one")
    return gpu and layers != 0


def context_size(path: str, max_length: int | None, n_ctx: int | None) -> int:
    """Returns the context in tokens: max_length or n_ctx; by default the model's own, at most DEFAULT_CONTEXT.

    Raises UserError if both are given and differ.
    """
    if max_length and n_ctx and int(max_length) != int(n_ctx):
        raise UserError(f"max_length={max_length} and n_ctx={n_ctx} are two names of one argument; give one")
    return int(max_length or n_ctx or min(trained_context(path) or DEFAULT_CONTEXT, DEFAULT_CONTEXT))


def trained_context(path: str) -> int | None:
    """Returns the context in tokens that the model was trained for, from the file's header; None if it has none."""
    metadata = load_llama(path, vocab_only=True).metadata
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length", "")
    return int(length) if length.isdigit() else None


def cache_types(arguments: dict[str, Any]) -> tuple[int | None, int | None]:
    """Replaces names of ggml types in type_k and type_v by their numbers; returns both, None where not given."""
    for name in ("type_k", "type_v"):
        if isinstance(arguments.get(name), str):
            arguments[name] = ggml_type(name, arguments[name])
    return arguments.get("type_k"), arguments.get("type_v")


def ggml_type(argument: str, name: str) -> int:
    """Returns the number of a ggml type such as q8_0. Raises UserError, which names the argument, for another name."""
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError:
        raise UserError(f"{argument}={name!r}: expected a ggml type such as f16, q8_0 or q4_0") from None
