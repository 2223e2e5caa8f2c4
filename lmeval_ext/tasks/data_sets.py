"""Data sets by short name, as `dataset=` of the perplexity tasks and of ExLlamaV3's data specs takes them.

The names, and the configuration, split and column that each stands for, are those of ExLlamaV3's eval/compare_q.py
(2026). Where that tool named a data set that only a loading script can make, which `datasets` no longer runs, the
row names the hub's own parquet conversion of it.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from lmeval_ext.errors import UserError


class DataSet(NamedTuple):
    """Where the rows of a text come from. files: a pattern for the hub's parquet reader, instead of a name."""

    path: str
    name: str | None = None
    split: str = "test"
    column: str = "text"
    files: str | None = None
    bundled: str | None = None


_WIKITEXT = "Salesforce/wikitext"
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/test/*.parquet"
_OPENWEBTEXT_10K = "hf://datasets/stas/openwebtext-10k@refs/convert/parquet/plain_text/train/*.parquet"

DATA_SETS: dict[str, DataSet] = {
    "wiki2": DataSet(_WIKITEXT, "wikitext-2-raw-v1"),
    "wikitext2": DataSet(_WIKITEXT, "wikitext-2-raw-v1"),
    "wiki103": DataSet(_WIKITEXT, "wikitext-103-raw-v1"),
    "wikitext103": DataSet(_WIKITEXT, "wikitext-103-raw-v1"),
    "ptb": DataSet("parquet", files=_PTB, column="sentence"),
    "lambada": DataSet("EleutherAI/lambada_openai"),
    "tinystories": DataSet("roneneldan/TinyStories", split="validation"),
    "c4": DataSet("allenai/c4", "en", split="validation"),
    "openwebtext10k": DataSet("parquet", split="train", files=_OPENWEBTEXT_10K),
    "openwebtext": DataSet("Skylion007/openwebtext", split="train[:1000]"),
    "fineweb": DataSet("HuggingFaceFW/fineweb", "sample-10BT", split="train[:1000]"),
    "fineweb-edu": DataSet("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train[:1000]"),
    "sample": DataSet("", bundled="sample.txt"),  # ours: the text in the package, no network
}


def data_set_settings(dataset: str) -> dict[str, Any]:
    """The settings that a name stands for; any other name is a data set of the hub, its test split.

    Raises UserError for a name that is nearly one of the table's.
    """
    row = DATA_SETS.get(dataset.lower())
    if row is None:
        near = difflib.get_close_matches(dataset.lower(), DATA_SETS, n=1, cutoff=0.75)
        if near:
            raise UserError(
                f"dataset={dataset!r} is unknown; did you mean {near[0]!r}? (known: {', '.join(DATA_SETS)}; any other "
                "data set of the hub goes by OWNER/NAME)"
            )
        row = DataSet(dataset)
    return {
        "dataset_path": row.path,
        "dataset_name": row.name,
        "dataset_split": row.split,
        "dataset_files": row.files,
        "text_column": row.column,
        "bundled_text": row.bundled,
    }
