"""The texts that the package ships: the sample, and the domains.

`domains/` has original texts, written for this project and under its licence: prose, German, Chinese, Japanese,
mathematics, Python, C, and conversations (`chat.jsonl`: one a line, a list of messages), which every model's own chat
template renders.
"""

from __future__ import annotations

import json
from pathlib import Path

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.corpus import SAMPLE, Corpus, read_corpus
from lmeval_ext.tokens import TextTokenizer

DOMAINS = SAMPLE.with_name("domains")


def bundled_texts() -> dict[str, Path]:
    """The files by the names that `bundled_text` takes: ``sample.txt``, ``domains/german.txt``."""
    texts = sorted([*DOMAINS.glob("*.txt"), *DOMAINS.glob("*.jsonl")])
    return {SAMPLE.name: SAMPLE} | {f"{DOMAINS.name}/{path.name}": path for path in texts}


def read_bundled(name: str, tokenizer: TextTokenizer) -> Corpus:
    """The text called `name`. Raises UserError for another name, and for conversations without a chat template."""
    path = bundled_texts().get(name)
    if path is None:
        raise UserError(f"bundled_text={name!r}: expected one of {', '.join(bundled_texts())}")
    if path.suffix != ".jsonl":
        return read_corpus(path)
    conversations = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Corpus(path.name, ("".join(map(tokenizer.chat_text, conversations)),))
