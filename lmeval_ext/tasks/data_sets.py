"""Data sets by short name, for `dataset=` of the perplexity tasks and of ExLlamaV3's data specs.

One row of `DATA_SETS` per name; to add a data set, add a row. The names, and the configuration, split and column of
each, are those of ExLlamaV3's eval/compare_q.py (2026). Some data sets of that tool need a loading script, which
`datasets` no longer runs; their rows name the hub's own parquet conversion instead.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from lmeval_ext.errors import UserError


class DataSet(NamedTuple):
    """Source of the rows of a text.

    path, name, split: as `datasets.load_dataset` takes them. column: the column of text. files: pattern of the files to
    read, for the path "parquet". bundled: a text file of this package, instead of a data set of the hub.
    """

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
    "sample": DataSet("", bundled="sample.txt"),  # ours: a text in this package, needs no network
}


def data_set_settings(dataset: str) -> dict[str, Any]:
    """Return the settings that a short name stands for; any other name is a hub id, read from its test split.

    Raises UserError for a name that is probably a misspelt one of the table.
    """
    row = DATA_SETS.get(dataset.lower())
    if row is None:
        near = difflib.get_close_matches(dataset.lower(), DATA_SETS, n=1, cutoff=0.75)
        if near:
            raise UserError(
                f"dataset={dataset!r} is unknown; did you mean {near[0]!r}? (known: {', '.join(DATA_SETS)}; name any "
                "other data set of the hub as OWNER/NAME)"
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
