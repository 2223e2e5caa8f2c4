"""GGUF files: which one is meant, checking arguments, and loading it with llama.cpp."""

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


def find_gguf(pretrained: str) -> str:
    """The GGUF file that `pretrained` means: itself, or the only one (or the first part) in a folder.

    Raises UserError where there is none, or the choice is not clear.
    """
    path = Path(pretrained).expanduser()
    if not path.exists():
        raise UserError(f"pretrained={pretrained!r}: no such file; give a .gguf file, or its folder")
    found = gguf_file(path)
    if found is None:
        kind = "holds safetensors too, or no GGUF file" if path.is_dir() else "is not a GGUF file"
        raise UserError(f"pretrained={pretrained!r} {kind}; name a .gguf file (llama.cpp's converter makes them)")
    with found.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"pretrained={str(found)!r} is not a GGUF file; convert it with llama.cpp's converter")
    return str(found)


_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, _user_data: Any) -> None:
    if level == _LOG_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def load_llama(path: str, verbose: bool = False, **arguments: Any) -> Any:
    """`llama_cpp.Llama`, or a UserError that says what may be wrong."""
    if not verbose:  # warnings of a vocabulary loaded without its model are no news
        llama_cpp.llama_log_set(_errors_only, None)
    _check_layers(path)
    try:
        return llama_cpp.Llama(model_path=path, verbose=verbose, **arguments)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"llama.cpp could not load {path!r}: {_why(path, error)}") from error


def _check_layers(path: str) -> None:
    """Raises UserError for a number of layers that makes llama.cpp abort, and this process with it."""
    try:
        header = read_gguf(Path(path))
    except StorageError:
        return  # llama.cpp refuses it; `_why` says what is wrong
    layers = header.integer(f"{header.metadata.get('general.architecture')}.block_count")
    if layers is None:
        return
    tensors = len(header.tensors) if (header.integer("split.count") or 1) == 1 else 0  # of a split file: unknown here
    if layers < 1 or layers > tensors > 0:  # any layer has a tensor
        raise UserError(
            f"{path!r} announces {layers} layers, and holds {len(header.tensors)} tensors: its header is damaged; "
            "download the file again"
        )


def _why(path: str, error: Exception) -> str:
    """What our own reader finds wrong with the file; else what may be, with llama.cpp's words."""
    try:
        measure(Path(path))
    except StorageError as reason:
        return str(reason)
    return (
        f"{first_line(error)}; the file may be damaged or of an architecture that {ENGINE_VERSION} does not know, or "
        "memory is short; lower n_ctx or n_gpu_layers, and run with verbose=True for llama.cpp's own words"
    )


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises UserError for a name that is no argument of llama_cpp.Llama, which takes any and ignores it."""
    known = [
        p.name for p in inspect.signature(llama_cpp.Llama.__init__).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise UserError(f"{name}={arguments[name]!r} is no argument of llamacpp; {hint}")


def trained_context(path: str) -> int | None:
    """The context that the file says its model was trained for, in tokens; None where it does not say."""
    metadata = load_llama(path, vocab_only=True).metadata
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length", "")
    return int(length) if length.isdigit() else None


def ggml_type(argument: str, name: str) -> int:
    from gguf import GGMLQuantizationType

    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError:
        raise UserError(f"{argument}={name!r}: expected a ggml type such as f16, q8_0 or q4_0") from None
