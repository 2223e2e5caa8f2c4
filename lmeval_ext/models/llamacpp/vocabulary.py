"""The vocabulary of a GGUF file as a tokenizer, and a check that another tokenizer agrees with it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.loading import find_gguf, llama_cpp, load_llama
from lmeval_ext.tokens import Encoded, HFTokenizer


class GGUFTokenizer:
    """The vocabulary of a GGUF file, as llama.cpp reads it.

    source: the file or its folder. llama: a `llama_cpp.Llama` that has it loaded; None: load it, without weights.
    name, prefix, bos_id: as in `tokens.TextTokenizer`.
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
        """Tokens that end a text or a turn, by llama.cpp's own list."""
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        return {i for i in range(self._llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)}

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """Ids of special tokens, by their text."""
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        ids = range(self._llama.n_vocab())
        return {self.piece(i): i for i in ids if llama_cpp.llama_vocab_is_control(vocab, i)}

    def bytes_of(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token. special: whether special tokens have any.

        llama-cpp-python 0.3.36's own `detokenize` returns none for tokens of more than 32 bytes.
        """
        vocab, size = llama_cpp.llama_model_get_vocab(self._llama.model), 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = int(llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special))
            if length >= 0:
                return buffer.raw[:length]
            size = -length  # llama.cpp returns the needed size, negated

    def piece(self, token: int) -> str:
        """The text of one token, special or not."""
        return self.bytes_of(token, special=True).decode(errors="replace")

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, as Jinja source."""
        return self._llama.metadata.get("tokenizer.chat_template")

    def render_chat(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The conversation as text, by the file's own template. Raises UserError if it has none."""
        if not self.chat_template:
            raise UserError(f"{self.name!r} has no chat template; give tokenizer= a model that has one")
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        formatter = Jinja2ChatFormatter(
            template=self.chat_template,
            eos_token=self.piece(int(self._llama.token_eos())),
            bos_token=self.piece(self.bos_id) if self.bos_id is not None else "",
            add_generation_prompt=add_generation_prompt,
        )
        return str(formatter(messages=chat_history).prompt)

    def encode(self, text: str) -> Encoded:
        """Ids of a text, as llama-perplexity makes them: special tokens spelt out in the text stay text."""
        data = text.encode()
        ids = self._llama.tokenize(data, add_bos=False, special=False)
        sizes = {i: len(self.bytes_of(i)) for i in set(ids)}
        ends = np.cumsum([sizes[i] for i in ids], dtype=np.int64)
        exact = len(ends) > 0 and ends[-1] == len(data)
        return Encoded(np.array(ids, dtype=np.int64), ends if exact else None)

    def chat_prefix(self) -> list[int]:
        raise UserError(
            f"chat_template=true: {self.name!r} has no template that can be rendered here; name the original model's "
            "tokenizer with tokenizer="
        )


class ComparedTokenizer:
    """A Transformers tokenizer that checks the ids of each text against a GGUF file's own vocabulary."""

    def __init__(self, tokenizer: HFTokenizer, gguf: GGUFTokenizer) -> None:
        self.name, self.prefix, self.bos_id = tokenizer.name, tokenizer.prefix, tokenizer.bos_id
        self._tokenizer, self._gguf = tokenizer, gguf

    def encode(self, text: str) -> Encoded:
        """Ids of a text. Raises UserError if the GGUF file's vocabulary gives others."""
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
                f"is {pieces[0]} against {pieces[1]}; leave tokenizer= out to score the GGUF's own tokens (not "
                "comparable with other families), or convert the GGUF again from the tokenizer's model"
            )
        return encoded

    def chat_prefix(self) -> list[int]:
        return self._tokenizer.chat_prefix()
