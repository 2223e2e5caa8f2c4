"""The vocabulary of a GGUF file as a tokenizer, and a check that another tokenizer agrees with it."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmeval_ext.errors import UserError
from lmeval_ext.models.llamacpp.binding import llama_cpp
from lmeval_ext.models.llamacpp.loading import find_gguf, load_vocabulary
from lmeval_ext.tokens import Encoded, HFTokenizer, TokenIds

logger = logging.getLogger(__name__)


class GGUFTokenizer:
    """The vocabulary of a GGUF file, as llama.cpp reads it.

    source: the file or its folder. llama: a `llama_cpp.Llama` that has it loaded; None: load it, without weights.
    name, prefix, bos_id: as in `tokens.TextTokenizer`.
    """

    def __init__(self, source: str, llama: Any = None) -> None:
        self.name = find_gguf(source)
        self._llama = llama or load_vocabulary(self.name)
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
        return self._with_attributes(llama_cpp.LLAMA_TOKEN_ATTR_CONTROL)

    @functools.cached_property
    def plain_in_text(self) -> dict[str, int]:
        """Ids of the tokens that llama.cpp does not find in a text unless it is asked to, by their text."""
        return self._with_attributes(llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN)

    def _with_attributes(self, flags: int) -> dict[str, int]:
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        ids = range(self._llama.n_vocab())
        return {self.piece(i): i for i in ids if int(llama_cpp.llama_vocab_get_attr(vocab, i)) & flags}

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
        spelt = [name for name in self.plain_in_text if name and name in text]
        if spelt:
            logger.warning(
                "the text spells special tokens (%s): without tokenizer= they are scored as plain text, as "
                "llama-perplexity does", _listed(spelt)
            )  # fmt: skip
        return self.tokens_of(text, False)

    def tokens_of(self, text: str, special: bool) -> Encoded:
        """Ids of a text. special: whether a special token that the text spells becomes that token's id."""
        data = text.encode()
        ids = self._llama.tokenize(data, add_bos=False, special=special)
        sizes = {i: len(self.bytes_of(i, special)) for i in set(ids)}
        ends = np.cumsum([sizes[i] for i in ids], dtype=np.int64)
        exact = len(ends) > 0 and ends[-1] == len(data)
        return Encoded(np.array(ids, dtype=np.int64), ends if exact else None)

    def chat_prefix(self) -> list[int]:
        raise self._no_chat("chat_template=true")

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise self._no_chat("conversations by a chat template")

    def _no_chat(self, what: str) -> UserError:
        return UserError(
            f"{what}: {self.name!r} has no template that can be rendered here; name the original model's "
            "tokenizer with tokenizer="
        )


class ComparedTokenizer:
    """A Transformers tokenizer that checks the ids of each text against a GGUF file's own vocabulary.

    Special tokens that a text spells ("<unk>" in PTB) are one token to Transformers, and to llama.cpp if it is asked
    to; the text is scored on these ids.
    """

    def __init__(self, tokenizer: HFTokenizer, gguf: GGUFTokenizer) -> None:
        self.name, self.prefix, self.bos_id = tokenizer.name, tokenizer.prefix, tokenizer.bos_id
        self._tokenizer, self._gguf = tokenizer, gguf

    def encode(self, text: str) -> Encoded:
        """Ids of a text. Raises UserError, with the reason, if the GGUF file's vocabulary gives others."""
        encoded = self._tokenizer.encode(text)
        at = _first_difference(encoded.ids, self._gguf.tokens_of(text, False).ids)
        if at is None:
            return encoded
        spelt = self._spelt(text)
        own = self._gguf.tokens_of(text, bool(spelt)).ids
        at = _first_difference(encoded.ids, own)
        if at is None:
            return encoded
        pieces = [
            f"{int(ids[at])} ({self._gguf.piece(int(ids[at]))!r})" if at < len(ids) else "its end"
            for ids in (encoded.ids, own)
        ]
        disagree = (
            f"tokenizer={self.name!r} and the vocabulary of {self._gguf.name!r} disagree on this text: token {at} is "
            f"{pieces[0]} against {pieces[1]}; "
        )
        if spelt and self._agree_between(text, spelt):
            raise UserError(
                f"{disagree}the text spells special tokens ({_listed(spelt)}), which the two treat differently, and "
                "they agree on all other text; take these out of the text, or leave tokenizer= out to score them as "
                "plain text (not comparable with other families)"
            )
        raise UserError(
            f"{disagree}leave tokenizer= out to score the GGUF's own tokens (not comparable with other families), or "
            "convert the GGUF again from the tokenizer's model"
        )

    def _spelt(self, text: str) -> list[str]:
        """Special and added tokens of either vocabulary that the text spells, longest first."""
        added = getattr(self._tokenizer.transformers, "added_tokens_decoder", {})
        names = {str(token) for token in added.values()} | self._gguf.plain_in_text.keys()
        return sorted((name for name in names if name and name in text), key=lambda name: (-len(name), name))

    def _agree_between(self, text: str, spelt: Sequence[str]) -> bool:
        """Whether both vocabularies give the same ids for the text between special tokens."""
        parts = {part for part in re.split("|".join(map(re.escape, spelt)), text) if part}
        return all(
            _first_difference(self._tokenizer.encode(part).ids, self._gguf.tokens_of(part, False).ids) is None
            for part in parts
        )

    def chat_prefix(self) -> list[int]:
        return self._tokenizer.chat_prefix()

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._tokenizer.chat_text(messages)


def _first_difference(a: TokenIds, b: TokenIds) -> int | None:
    """Returns the first position at which two sequences differ; None if they are equal."""
    common = min(len(a), len(b))
    differ = np.flatnonzero(a[:common] != b[:common])
    return int(differ[0]) if len(differ) else None if len(a) == len(b) else common


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (", …" if len(names) > most else "")
