"""Writes the tokenizer of a Hugging Face checkpoint as GGUF metadata: tokens, types, merges and special ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from outputs import UsageError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# llama.cpp's name for a pre-tokenizer, to the steps in tokenizer.json that it stands for
# (`llama_vocab::impl::load` and `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}


def pre_tokenizer_name(tokenizer: dict[str, Any], source: Path) -> str:
    """Returns llama.cpp's name for tokenizer.json's pre-tokenizer (UsageError if the table lacks it)."""
    pre_tokenizer = tokenizer["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}  # moves offsets, not tokens
        for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    ]
    for name, expected in PRE_TOKENIZERS.items():
        if steps == expected:
            return name
    raise UsageError(f"{source}: unknown pre-tokenizer; expected one of {', '.join(PRE_TOKENIZERS)}")


def token_table(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Returns text and type of the ids 0 … size - 1; ids that the tokenizer lacks are padding, marked unused."""
    texts = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, index in tokenizer["model"]["vocab"].items():
        texts[index], types[index] = text, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        texts[token["id"]], types[token["id"]] = token["content"], kind
    return texts, types


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts BOS before and EOS after a text."""
    ids = tokenizer("a").input_ids
    return ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id


def add_vocabulary(writer: gguf.GGUFWriter, source: Path, size: int) -> None:
    """Write the tokenizer of checkpoint `source`, whose embedding has `size` rows."""
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{source} has no tokenizer.json: only that form of tokenizer is supported")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer["model"]["type"] != "BPE" or tokenizer["normalizer"] is not None:
        raise UsageError(f"{path}: expected byte-level BPE without a normalizer")
    loaded = AutoTokenizer.from_pretrained(source)
    if len(loaded) > size:
        raise UsageError(f"{source}: {len(loaded)} tokens, but an embedding of {size} rows")
    texts, types = token_table(tokenizer, size)
    merges = tokenizer["model"]["merges"]
    add_bos, add_eos = special_ends(loaded)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer, source))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    special = {
        writer.add_bos_token_id: loaded.bos_token_id,
        writer.add_eos_token_id: loaded.eos_token_id,
        writer.add_unk_token_id: loaded.unk_token_id,
        writer.add_pad_token_id: loaded.pad_token_id,
    }
    for add, index in special.items():
        if index is not None:
            add(index)
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
