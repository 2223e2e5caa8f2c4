"""Bits per weight, weight bytes and KV-cache bytes of a checkpoint, read from its headers alone.

    >>> from lmeval_ext.storage import inspect
    >>> inspect("checkpoints/model-nvfp4").layer_bpw  # doctest: +SKIP
    4.500008

No weight is ever read. The only tensor contents read are the two numbers of compressed-tensors' `weight_shape`.

Files, in the order in which data flows:

    measure             from a path to a StorageInfo: chooses the reader, names family and scheme
    checkpoint          a Hugging Face folder: its config.json, its quantization config, its tensors
    shards              which safetensors files belong to it; shard_index: model.safetensors.index.json
    safetensors_header  the header of one safetensors file; header_runs: collects its repeating entries
    json_file           strict JSON for headers and configs
    gguf_checkpoint     GGUF files, split ones included; gguf_header: the header of one of them
    grouping            from stored tensors to logical weights, by the tables below
    decoder             where the decoder is, and with it the role of each weight
    accounting          from weights to figures, the same for every format
    info                the result (StorageInfo) and the errors (StorageError)
    kv_cache            bytes of the KV cache at any context; kv_layers: what each layer keeps, as read by
    kv_config, kv_gguf  from config.json, and from GGUF metadata by llama.cpp's rules
    tensors, pieces     the records that the files above exchange
    files, rounding     opens files inside a checkpoint alone; exact integer arithmetic

Tables:

    packings            one row per packing: the tensors that together store one weight matrix
    layouts             one function per packing: from stored shapes to the logical shape
    schemes             one row per `quant_method`: the name of the scheme
    roles               names of weights: head, embedding, router, draft, words of other modalities
    kv_families         one row per `model_type`: usual values, windows, states; kv_gguf has those of llama.cpp

To add a format: one row of `packings.PACKINGS`, its shape function in `layouts`, one row of `schemes.SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmeval_ext.storage.info import Excluded, StorageError, StorageInfo

if TYPE_CHECKING:
    from lmeval_ext.storage.tensors import Header

__all__ = ["Excluded", "StorageError", "StorageInfo", "inspect"]


def inspect(path: str | Path, headers: Sequence[Header] | None = None, precision: int | None = None) -> StorageInfo:
    """Measure a checkpoint.

    path: a checkpoint folder, a .safetensors file (config.json is read from the same folder) or a .gguf file. Any
    part of a sharded or split checkpoint stands for all of it. A folder with safetensors files is read as
    safetensors; a folder that holds only the parts of a single GGUF is read as GGUF.

    headers: of the tensors, for a folder that keeps them in files of another kind. precision: bits per weight to
    count of a checkpoint that holds the model at several precisions (Any-Precision); None: the file with all of them.

    Raises StorageError for files that are missing, damaged or hostile. A sound checkpoint in a format that is not
    supported gives None and a note instead (see StorageInfo).
    """
    from lmeval_ext.storage.measure import measure

    return measure(Path(path), headers, precision)
