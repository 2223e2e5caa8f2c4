"""Bits per weight and weight bytes of a checkpoint, from its headers alone.

    >>> from lmeval_ext.storage import inspect
    >>> inspect("checkpoints/model-nvfp4").layer_bpw  # doctest: +SKIP
    4.500008

Readers (`safetensors_header`, `gguf_header`) turn headers into tensors, `grouping` turns tensors into logical
weights by the tables of `packings` and `roles`, `accounting` sums them up. A new format is one row of
`packings.PACKINGS` (its shape function stands in `layouts`) and one of `schemes.SCHEMES`. No weight is ever read; the
only tensor contents read are the two numbers of compressed-tensors' `weight_shape`.
"""

from __future__ import annotations

from pathlib import Path

from lmeval_ext.storage.info import Excluded, StorageError, StorageInfo

__all__ = ["Excluded", "StorageError", "StorageInfo", "inspect"]


def inspect(path: str | Path) -> StorageInfo:
    """Measure a checkpoint.

    path: a checkpoint folder, a .safetensors file (its config.json is looked for beside it) or a .gguf file; any
    part of a sharded or split checkpoint stands for the whole. A folder with safetensors files is read as those;
    one that holds nothing but the parts of a single GGUF is read as that.

    Raises StorageError for files that are missing, damaged or hostile. What is sound but not understood gives None
    and a note instead (see StorageInfo).
    """
    from lmeval_ext.storage.measure import measure

    return measure(Path(path))
