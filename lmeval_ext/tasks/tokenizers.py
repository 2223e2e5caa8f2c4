"""Which tokenizer a task's text is tokenized with: a Transformers folder or a GGUF file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.storage.measure import gguf_file
from lmeval_ext.tokens import HFTokenizer, TextTokenizer


def load_tokenizer(settings: dict[str, Any]) -> TextTokenizer:
    """Load the tokenizer that the settings name.

    settings: model arguments and --metadata, merged by the harness. `tokenizer` is used if given, otherwise the
    checkpoint's own: the vocabulary of a GGUF file, or the tokenizer in the folder. With `tokenizer` and a GGUF
    checkpoint, both are loaded and every encoding is compared.

    Raises UserError if no tokenizer is named or the named one cannot be loaded.
    """
    model = settings.get("pretrained")
    source = settings.get("tokenizer") or model
    if not isinstance(source, str) or not source:
        raise UserError(
            "no tokenizer is known: the task was built without model arguments or with a model object; name one with "
            '--metadata \'{"tokenizer": "FOLDER or hub id"}\' or TaskManager(metadata={"tokenizer": …})'
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
    """Return whether storage and the llamacpp adapter, too, take the path for a GGUF model."""
    return Path(source).exists() and gguf_file(Path(source)) is not None


def _hf_tokenizer(source: str, settings: dict[str, Any]) -> HFTokenizer:
    # `revision` is the model's: it applies to the checkpoint's own tokenizer only
    model_revision = None if settings.get("tokenizer") else settings.get("revision")
    revision = settings.get("tokenizer_revision") or model_revision
    return HFTokenizer(source, revision, bool(settings.get("trust_remote_code", False)))
