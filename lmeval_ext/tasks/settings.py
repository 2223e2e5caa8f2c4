"""The settings of the perplexity tasks, read from the harness' metadata: one row each.

The harness merges the task's YAML, the model arguments and `--metadata`, in this order, into one
dictionary; settings are the keys below, everything else in it belongs to the model.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.windows import PROTOCOLS, WindowSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """All settings of a perplexity task. None for eval_len, stride and max_rows: the protocol's usual value."""

    protocol: str = "exllama"
    eval_len: int | None = None
    stride: int | None = None
    max_rows: int | None = None
    warmup_tokens: int = 0
    bos: str = "tokenizer"
    blank_rows: str = "keep"
    tokenizer: str | None = None
    text_path: str | None = None
    bundled_text: str | None = None
    dataset_path: str = "Salesforce/wikitext"
    dataset_name: str | None = "wikitext-2-raw-v1"
    dataset_split: str = "test"
    text_column: str = "text"

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Settings:
        """Pick the settings out of `metadata`; warns of a key that looks like a misspelt setting."""
        names = cls.__dataclass_fields__
        for key in metadata:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            if key not in names and key not in _MODEL_ARGUMENTS and near:
                logger.warning("metadata %r is no setting of the perplexity tasks; did you mean %r?", key, near[0])
        return cls(**{name: metadata[name] for name in names if name in metadata})

    def window_spec(self) -> WindowSpec:
        """Raises UserError where a value is out of range."""
        rule = PROTOCOLS.get(self.protocol)
        if rule is None:
            raise UserError(f"protocol={self.protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        eval_len = rule.eval_len if self.eval_len is None else self.eval_len
        usual_stride = eval_len if rule.disjoint else rule.stride
        return WindowSpec(
            self.protocol,
            eval_len,
            usual_stride if self.stride is None else self.stride,
            rule.max_rows if self.max_rows is None else self.max_rows,
            self.warmup_tokens,
        )


_MODEL_ARGUMENTS = {"tokenizer_mode", "tokenizer_revision"}  # near a setting's name, but arguments of models


def check_context(eval_len: int, metadata: Mapping[str, Any]) -> None:
    """Refuse windows longer than the model's context, as far as the arguments and config.json tell it.

    Our adapters check again, against the engine. Stock models do not: stock `vllm` drops the start of a
    window in silence, and needs one position more than the window, for the token it always generates.
    """
    limits = [(f"{name}={metadata[name]}", metadata[name]) for name in ("max_length",) if metadata.get(name)]
    if metadata.get("max_model_len"):
        limits.append(
            (
                f"max_model_len={metadata['max_model_len']}, less one generated token",
                int(metadata["max_model_len"]) - 1,
            )
        )
    if not limits and (context := _config_context(metadata.get("pretrained"))):
        limits.append((f"max_position_embeddings={context} in config.json of {metadata['pretrained']!r}", context))
    for name, limit in limits:
        if eval_len > int(limit):
            raise UserError(
                f"eval_len={eval_len} is beyond the model's context ({name}); lower eval_len with --metadata "
                f"'{{\"eval_len\": {int(limit)}}}', or raise the model's limit if the model can take it"
            )


def _config_context(pretrained: Any) -> int | None:
    path = Path(pretrained) / "config.json" if isinstance(pretrained, str) else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        text = config.get("text_config") or config
        value = text.get("max_position_embeddings")
    except (ValueError, AttributeError, OSError):
        return None  # the model's own loader will say what is wrong with the file
    return value if isinstance(value, int) and value > 0 else None
