"""Tokenizes text, with one rule for BOS and one for the bytes that each token covers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lmeval_ext.errors import UserError, first_line

# Put before every window with chat_template=true, as in ExLlamaV3's eval/compare_q_transformers.py
CHAT_MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "Say something."}]

BOS_MODES = ("tokenizer", "once", "each", "none")

TokenIds = npt.NDArray[np.int64]

# Digits, scripts, spaces and code: tokenizers of different models split these differently
PROBE = (
    "In 1984, naïve cafés — l'été, größer, Привет мир, 你好世界, नमस्ते:\n\n\tdef f(x): return x**2 != 12345.678  # 🙂"
)


def tokenizer_sha256(probe_ids: Sequence[int] | TokenIds) -> str:
    """Identifies a tokenizer in any engine: sha256 over the ids of `PROBE`, little-endian int64, no special tokens."""
    return hashlib.sha256(np.asarray(probe_ids, dtype="<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, without special tokens.

    byte_ends: for each token, the number of UTF-8 bytes of the text up to its end, so tokens [a, b) have
    byte_ends[b-1] - byte_ends[a-1] bytes; None if the tokenizer gives no offsets.
    """

    ids: TokenIds
    byte_ends: npt.NDArray[np.int64] | None


class TextTokenizer(Protocol):
    """What the tasks need from a tokenizer: `HFTokenizer`, or the GGUF vocabulary in models/llamacpp/vocabulary.py.

    name: recorded in results. prefix: the special tokens that it puts before a text by default. bos_id: its BOS token,
    None if it has none.
    """

    name: str
    prefix: list[int]
    bos_id: int | None

    def encode(self, text: str) -> Encoded: ...

    def chat_prefix(self) -> list[int]: ...

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str: ...


@dataclass(frozen=True)
class TokenSequence:
    """A text's tokens, from which windows are cut.

    window_bos: the id that replaces the first token of every window, or None. bos: how BOS was added: "once", "each" or
    "none". byte_ends: as in `Encoded`; special tokens have 0 bytes.
    """

    ids: TokenIds
    byte_ends: npt.NDArray[np.int64] | None
    bos: str
    window_bos: int | None


def tokenize(text: str, tokenizer: TextTokenizer, bos: str, each_by_default: bool) -> TokenSequence:
    """Tokenize `text` with BOS by one of `BOS_MODES`.

    bos: "tokenizer" = as the tokenizer does by default (in every window with `each_by_default`, as in llama.cpp);
    "once" = before the text; "each" = before the text, and in place of every window's first token; "none" = nowhere.
    Raises UserError if the mode needs a BOS and the tokenizer has none.
    """
    if bos not in BOS_MODES:
        raise UserError(f"bos={bos!r}: expected one of {', '.join(BOS_MODES)}")
    if bos in ("once", "each") and tokenizer.bos_id is None:
        raise UserError(f"bos={bos}: the tokenizer {tokenizer.name!r} has no BOS token; use bos=none")
    prefix = {"tokenizer": tokenizer.prefix, "none": []}.get(bos, [tokenizer.bos_id])
    in_each = bos == "each" or (bos == "tokenizer" and each_by_default and tokenizer.bos_id in prefix)
    encoded = tokenizer.encode(text)
    ids = np.concatenate([np.array(prefix, dtype=np.int64), encoded.ids])
    ends = encoded.byte_ends
    if ends is not None:
        ends = np.concatenate([np.zeros(len(prefix), dtype=np.int64), ends])
    applied = "each" if in_each else "once" if prefix else "none"
    return TokenSequence(ids, ends, applied, tokenizer.bos_id if in_each else None)


class HFTokenizer:
    """A Transformers tokenizer from a checkpoint folder, a hub id, or a folder with `tokenizer.json`."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        add_bos_token: bool | None = None,
    ) -> None:
        """Load the tokenizer. Raises UserError if there is none at `name`.

        add_bos_token: passed to the tokenizer, as the harness' `hf` does; None: its own default.
        """
        from transformers import AutoTokenizer

        self.name = name
        more = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        try:
            self.transformers: Any = AutoTokenizer.from_pretrained(
                name, revision=revision or "main", trust_remote_code=trust_remote_code, **more
            )
        except Exception as error:
            reason = first_line(error)
            raise UserError(
                f"tokenizer={name!r} could not be loaded ({type(error).__name__}: {reason}); name a folder with the "
                'tokenizer\'s files or a hub id with --metadata \'{"tokenizer": "…"}\''
            ) from error
        self.bos_id: int | None = self.transformers.bos_token_id
        self.prefix = self._find_prefix()

    def encode(self, text: str) -> Encoded:
        fast = bool(getattr(self.transformers, "is_fast", False))
        # `verbose=False` suppresses the warning about texts longer than the context, which windows are made for
        batch = self.transformers(text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
        ids = np.array(batch["input_ids"], dtype=np.int64)
        return Encoded(ids, _byte_ends(text, batch["offset_mapping"]) if fast else None)

    def chat_prefix(self) -> list[int]:
        """Tokens of `CHAT_MESSAGES` by the chat template, up to the start of the model's reply.

        Raises UserError if the tokenizer has no template, or if its template rejects the messages.
        """
        text = self._render(CHAT_MESSAGES, True, "chat_template=true", ", or leave chat_template out")
        return list(self.transformers(text, add_special_tokens=False)["input_ids"])

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A complete conversation by the chat template. Raises UserError as `chat_prefix` does."""
        return self._render(messages, False, "conversations by a chat template", "; the other texts need none")

    def _render(self, messages: Sequence[Mapping[str, str]], reply: bool, what: str, otherwise: str) -> str:
        try:
            return str(
                self.transformers.apply_chat_template(list(messages), add_generation_prompt=reply, tokenize=False)
            )
        except Exception as error:  # a template may raise any exception
            raise UserError(
                f"{what}: the tokenizer {self.name!r} renders none ({first_line(error)}); use the tokenizer "
                f"of an instruction-tuned model{otherwise}"
            ) from error

    def _find_prefix(self) -> list[int]:
        # The tokens before a text's own when special tokens are added. A suffix (EOS) does not count.
        probe = "a"
        plain = self.transformers(probe, add_special_tokens=False)["input_ids"]
        special = self.transformers(probe)["input_ids"]
        for cut in range(len(special) - len(plain) + 1):
            if special[cut : cut + len(plain)] == plain:
                return list(special[:cut])
        return []


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of a Transformers tokenizer's special tokens by their text; empty for Mistral's own tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): i for i, token in added.items() if token.special}


def ending_tokens(special: dict[str, int], until: Sequence[str]) -> set[int]:
    """Ids of the special tokens whose name contains a stop sequence: these end a text, without being part of it."""
    return {i for name, i in special.items() if any(stop and stop in name for stop in until)}


def wants_special_tokens(text: str, asked: bool | None, add_bos_token: bool | None, prefix: str) -> bool | None:
    """Whether to add special tokens to a text, by the rule of the harness' `hf`; None: the tokenizer's default.

    asked: the caller's argument, which has priority. prefix: text of the prefix token; a text that begins with it gets
    no other.
    """
    from lm_eval.models.utils import has_bos_prefix  # the adapters, which call this, have it loaded

    if asked is not None:
        return asked
    return False if has_bos_prefix(text, prefix) else add_bos_token


def _byte_ends(text: str, offsets: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """`Encoded.byte_ends` from character offsets. Of several tokens in one character, the first has all its bytes."""
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    bytes_to = np.zeros(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    np.cumsum(widths, out=bytes_to[1:])
    return bytes_to[ends]
