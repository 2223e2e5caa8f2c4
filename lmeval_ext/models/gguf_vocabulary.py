"""GGUF files as llama.cpp sees them: which file is meant, loading it, and its vocabulary as a tokenizer."""

from __future__ import annotations

import ctypes
import difflib
import functools
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.models.base import first_line
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.gguf_header import read_gguf
from lmeval_ext.storage.measure import gguf_file, measure
from lmeval_ext.tokens import Encoded, HFTokenizer

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


class GGUFTokenizer:
    """The vocabulary of a GGUF file, as llama.cpp reads it; weights are not loaded.

    Special tokens spelt out in a text stay text, as in llama-perplexity.
    """

    def __init__(self, source: str, llama: Any = None) -> None:
        self.name = find_gguf(source)
        self._llama = llama or load_llama(self.name, vocab_only=True)
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        bos = self._llama.token_bos()
        self.bos_id: int | None = bos if bos >= 0 else None
        adds = self.bos_id is not None and bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        self.prefix = [bos] if adds else []

    @functools.cached_property
    def ends(self) -> set[int]:
        """Tokens that end a text or a turn, as llama.cpp knows them."""
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        return {i for i in range(self._llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)}

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """Special tokens, by their text."""
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        ids = range(self._llama.n_vocab())
        return {self.piece(i): i for i in ids if llama_cpp.llama_vocab_is_control(vocab, i)}

    def bytes_of(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token; of a special one only if asked for.

        llama-cpp-python 0.3.36's own `detokenize` has none for tokens of more than 32 bytes.
        """
        vocab, size = llama_cpp.llama_model_get_vocab(self._llama.model), 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = int(llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special))
            if length >= 0:
                return buffer.raw[:length]
            size = -length  # what it needs

    def piece(self, token: int) -> str:
        """The text of one token."""
        return self.bytes_of(token, special=True).decode(errors="replace")

    def encode(self, text: str) -> Encoded:
        data = text.encode()
        ids = self._llama.tokenize(data, add_bos=False, special=False)
        sizes = {i: len(self.bytes_of(i)) for i in set(ids)}
        ends = np.cumsum([sizes[i] for i in ids], dtype=np.int64)
        exact = len(ends) > 0 and ends[-1] == len(data)
        return Encoded(np.array(ids, dtype=np.int64), ends if exact else None)

    def chat_prefix(self) -> list[int]:
        raise UserError(
            f"chat_template=true: {self.name!r} brings no template that can be rendered here; name the original "
            "model's tokenizer with tokenizer="
        )


class ComparedTokenizer:
    """A Transformers tokenizer whose ids are checked, text by text, against a GGUF file's own vocabulary."""

    def __init__(self, tokenizer: HFTokenizer, gguf: GGUFTokenizer) -> None:
        self.name, self.prefix, self.bos_id = tokenizer.name, tokenizer.prefix, tokenizer.bos_id
        self._tokenizer, self._gguf = tokenizer, gguf

    def encode(self, text: str) -> Encoded:
        encoded, own = self._tokenizer.encode(text), self._gguf.encode(text)
        a, b = encoded.ids, own.ids
        common = min(len(a), len(b))
        differ = np.flatnonzero(a[:common] != b[:common])
        if len(differ) or len(a) != len(b):
            at = int(differ[0]) if len(differ) else common
            pieces = [
                f"{int(ids[at])} ({self._gguf.piece(int(ids[at]))!r})" if at < len(ids) else "its end" for ids in (a, b)
            ]
            raise UserError(
                f"tokenizer={self.name!r} and the vocabulary of {self._gguf.name!r} disagree on this text: token {at} "
                f"is {pieces[0]} against {pieces[1]}; leave tokenizer= out to score the GGUF's own tokens (which other "
                "families cannot be compared with), or convert the GGUF again from the tokenizer's model"
            )
        return encoded

    def chat_prefix(self) -> list[int]:
        return self._tokenizer.chat_prefix()
