"""Which tokenizer a task's text is cut with: a Transformers folder or a GGUF file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.storage.measure import gguf_file
from lmeval_ext.tokens import HFTokenizer, TextTokenizer


def load_tokenizer(settings: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that the settings (model arguments and --metadata, merged by the harness) name.

    `tokenizer` wins; else the checkpoint's own: a GGUF file's vocabulary, or the folder's tokenizer.
    Raises UserError where none is named.
    """
    named, model = settings.get("tokenizer"), settings.get("pretrained")
    source = named or model
    if not isinstance(source, str) or not source:
        raise UserError(
            "no tokenizer is known: the task was built without model arguments, or with a model object; name one "
            'with --metadata \'{"tokenizer": "FOLDER or hub id"}\' or TaskManager(metadata={"tokenizer": …})'
        )
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    gguf = model if isinstance(model, str) and _is_gguf(model) else None
    if _is_gguf(source) or gguf:
        from lmeval_ext.models.llamacpp.vocabulary import ComparedTokenizer, GGUFTokenizer

        if _is_gguf(source):
            return GGUFTokenizer(source)
        return ComparedTokenizer(_hf_tokenizer(source, settings), GGUFTokenizer(str(gguf)))
    return _hf_tokenizer(source, settings)


def _is_gguf(source: str) -> bool:
    # The same rule by which storage and the llamacpp adapter take a path for a GGUF model
    return Path(source).exists() and gguf_file(Path(source)) is not None


def _hf_tokenizer(source: str, settings: dict[str, Any]) -> HFTokenizer:
    named = settings.get("tokenizer")
    revision = settings.get("tokenizer_revision") or (None if named else settings.get("revision"))
    return HFTokenizer(source, revision, bool(settings.get("trust_remote_code", False)))
