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
from lmeval_ext.tasks.data_sets import data_set_settings
from lmeval_ext.tasks.protocols import PROTOCOLS, WindowSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSettings:
    """All settings of a perplexity task. None for eval_len, stride and max_rows: the protocol's usual value.

    dataset: a short name (`tasks/data_sets.py`) or a hub id; it stands for the dataset_* settings, and each of those
    that is given wins over it. max_text_rows: the first so many rows of the data set, blank ones counted, 0 for all.
    chat_template: put the tokenizer's chat template, up to where an answer begins, before every window.
    """

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
    dataset_files: str | None = None
    dataset: str | None = None
    max_text_rows: int = 0
    chat_template: bool = False

    def __post_init__(self) -> None:
        rows = self.max_text_rows
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise UserError(f"max_text_rows={rows!r}: expected a whole number of at least 0 (0 = all rows)")
        if self.text_path is not None and not isinstance(self.text_path, str):
            raise UserError(f"text_path={self.text_path!r}: expected the name of a file")
        if self.blank_rows != "keep" and PROTOCOLS.get(self.protocol) and PROTOCOLS[self.protocol].raw_text:
            raise UserError(
                f"blank_rows={self.blank_rows}: protocol {self.protocol!r} takes the raw text; leave blank_rows out"
            )
        if not isinstance(self.chat_template, bool):
            raise UserError(f"chat_template={self.chat_template!r}: expected true or false")

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> TaskSettings:
        """Pick the settings out of `metadata`; warns of a key that looks like a misspelt setting."""
        names = cls.__dataclass_fields__
        for key in metadata:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            if key not in names and key not in _MODEL_ARGUMENTS and near:
                logger.warning("metadata %r is no setting of the perplexity tasks; did you mean %r?", key, near[0])
        given = {name: metadata[name] for name in names if name in metadata}
        if given.get("dataset"):
            known = data_set_settings(str(given["dataset"]))
            given = known | given | {"bundled_text": known["bundled_text"]}
        return cls(**given)

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


_MODEL_ARGUMENTS = {
    "tokenizer_mode",
    "tokenizer_revision",
    "chat_template_args",
}  # near a setting's name, but arguments of models


def check_context(eval_len: int, metadata: Mapping[str, Any], prefix: int = 0) -> None:
    """Refuse windows longer than the model's context, as far as the arguments and config.json tell it.

    prefix: tokens that go before each window.

    This is the early word, before a model is loaded; `lmeval_ext.requests` checks every model itself again.
    """
    limits = [(f"{name}={metadata[name]}", metadata[name]) for name in ("max_length",) if _number(metadata.get(name))]
    if _number(metadata.get("max_model_len")):
        limits.append(
            (
                f"max_model_len={metadata['max_model_len']}, less one generated token",
                int(metadata["max_model_len"]) - 1,
            )
        )
    if not limits and (context := _config_context(metadata.get("pretrained"))):
        limits.append((f"max_position_embeddings={context} in config.json of {metadata['pretrained']!r}", context))
    for name, limit in limits:
        if eval_len + prefix > int(limit):
            template = f" with the {prefix} tokens of the chat template" if prefix else ""
            raise UserError(
                f"eval_len={eval_len}{template} is beyond the model's context ({name}); lower eval_len with --metadata "
                f"'{{\"eval_len\": {int(limit) - prefix}}}', or raise the model's limit if the model can take it"
            )


def _number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdigit())  # anything else: the model will say


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
