"""The settings of the perplexity tasks, read from the harness' metadata.

The harness merges the task's YAML, the model arguments and `--metadata`, in this order, into one dictionary. The fields
of `TaskSettings` are the settings; every other key belongs to the model.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError
from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_config
from lmeval_ext.tasks.data_sets import data_set_settings
from lmeval_ext.tasks.protocols import PROTOCOLS, WindowSpec, find_protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSettings:
    """All settings of a perplexity task.

    protocol: a row of `protocols.PROTOCOLS`. eval_len, stride, max_rows, warmup_tokens: as in `WindowSpec`; None means
    the protocol's usual value. bos: as in `lmeval_ext.tokens.tokenize`. blank_rows: "keep" or "drop", as in
    `Corpus.joined`. tokenizer: a folder, hub id or GGUF file, None for the checkpoint's own. text_path: a raw text file
    or parquet file, used instead of the data set. bundled_text: a text file of this package.

    dataset_path, dataset_name, dataset_split, text_column, dataset_files: as in `data_sets.DataSet`. dataset: a short
    name of `data_sets.DATA_SETS` or a hub id; it sets these five, and any of them that is also given wins.
    max_text_rows: how many rows of the text to use, blank ones counted, 0 for all. chat_template: put the tokenizer's
    chat template, up to where an answer begins, before every window.
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
                f"blank_rows={self.blank_rows}: protocol {self.protocol!r} uses the raw text; leave blank_rows out"
            )
        if not isinstance(self.chat_template, bool):
            raise UserError(f"chat_template={self.chat_template!r}: expected true or false")

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> TaskSettings:
        """Return the settings in `metadata`. Warns of a key that is probably a misspelt setting."""
        names = cls.__dataclass_fields__
        for key in metadata:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            if key not in names and key not in _MODEL_ARGUMENTS and near:
                logger.warning("metadata %r is not a setting of the perplexity tasks; did you mean %r?", key, near[0])
        given = {name: metadata[name] for name in names if name in metadata}
        if given.get("dataset"):
            row = data_set_settings(str(given["dataset"]))
            given = row | given | {"bundled_text": row["bundled_text"]}
        return cls(**given)

    def window_spec(self) -> WindowSpec:
        """Return the protocol with these settings. Raises UserError if one of them is unknown or out of range."""
        protocol = find_protocol(self.protocol)
        eval_len = protocol.eval_len if self.eval_len is None else self.eval_len
        usual_stride = eval_len if protocol.disjoint or protocol.stride is None else protocol.stride
        return WindowSpec(
            self.protocol,
            eval_len,
            usual_stride if self.stride is None else self.stride,
            protocol.max_rows if self.max_rows is None else self.max_rows,
            self.warmup_tokens,
        )


# Arguments of models whose names resemble a setting's
_MODEL_ARGUMENTS = {"tokenizer_mode", "tokenizer_revision", "chat_template_args"}


def check_context(eval_len: int, metadata: Mapping[str, Any], prefix: int = 0) -> None:
    """Raise UserError for windows longer than the model's context, as given by the model arguments or config.json.

    prefix: number of tokens before each window. This check runs before a model is loaded; `lmeval_ext.requests` checks
    the loaded model again.
    """
    for name, limit in context_limits(metadata):
        if eval_len + prefix > limit:
            template = f" with the {prefix} tokens of the chat template" if prefix else ""
            raise UserError(
                f"eval_len={eval_len}{template} is beyond the model's context ({name}); lower eval_len with --metadata "
                f"'{{\"eval_len\": {limit - prefix}}}', or raise the limit if the model supports more"
            )


def context_limits(metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return what is known of the model's context before it is loaded: the words for it, and its tokens."""
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
    return [(name, int(limit)) for name, limit in limits]


def _number(value: Any) -> bool:
    """Return whether an argument is a whole number; the model itself refuses anything else."""
    return isinstance(value, int) or (isinstance(value, str) and value.isdigit())


def _config_context(pretrained: Any) -> int | None:
    """Return max_position_embeddings of a checkpoint folder, None if it cannot be read from config.json."""
    if not isinstance(pretrained, str) or not (Path(pretrained) / "config.json").is_file():
        return None
    try:
        return read_config(Path(pretrained)).context_length
    except (StorageError, OSError):
        return None  # the model's own loader reports a damaged file
