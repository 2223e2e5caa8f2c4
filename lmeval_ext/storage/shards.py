"""Which safetensors files belong to a checkpoint, and the headers of all of them."""

from __future__ import annotations

import re
from itertools import compress
from pathlib import Path

from lmeval_ext.storage.files import path_inside
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, parts_missing
from lmeval_ext.storage.safetensors_header import new_runs, read_header
from lmeval_ext.storage.shard_index import INDEX, index_files, index_lines
from lmeval_ext.storage.tensors import Header, TensorTable

SHARD = re.compile(r"^(.*)-(\d{5,})-of-(\d{5,})\.safetensors$")
# The files that ExLlamaV2's converter writes (0.3.2, conversion/compile.py). The converter also copies every other file
# of the original, including its index, which names files that the converted folder does not have.
EXL2_FILE = re.compile(r"^output(-\d{5,}-of-\d{5,})?\.safetensors$")


def _only_file(path: Path, notes: list[str]) -> Path | None:
    """Return the one file to read; None for a sharded checkpoint, whose files the index or the shard names give."""
    if path.is_dir():
        return None
    if SHARD.match(path.name):
        notes.append(f"{path.name} is one shard: the whole checkpoint in its folder was read")
        return None
    return path


def read_tensors(path: Path, notes: list[str]) -> TensorTable:
    """Read the headers of all files that belong to a checkpoint. Raises StorageError for missing or damaged files.

    path: its folder, or one of its files. notes: remarks are added to it.
    """
    folder = path if path.is_dir() else path.parent
    only = _only_file(path, notes)
    if only is not None:
        return _merge([only])
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if (folder / INDEX).exists():
        if not _is_copied_index(folder, names):
            return _indexed(folder, notes)
        notes.append(f"{INDEX} is the original's, copied by ExLlamaV2's converter: not used")
    if "model.safetensors" in names:
        return _merge([path_inside(folder, "model.safetensors")])
    shards = [match for name in names if (match := SHARD.match(name))]
    if shards:
        return _merge(_complete(folder, shards))
    if len(names) == 1:
        return _merge([path_inside(folder, names[0])])
    if names:
        raise StorageError(
            f"{folder} holds {len(names)} safetensors files and no {INDEX}. Name one of: {', '.join(names)}."
        )
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise StorageError(
            f"{folder} holds only pickle files ({pickles[0]}), which can run code and are never opened. "
            "Convert the checkpoint to safetensors (transformers: save_pretrained) or download a safetensors revision."
        )
    raise StorageError(f"{folder} holds no .safetensors file and no .gguf file. Give the folder of a checkpoint.")


def _is_copied_index(folder: Path, names: list[str]) -> bool:
    """Return whether the index is the original's: it names none of the weight files, and ExLlamaV2 wrote these."""
    return bool(names) and all(map(EXL2_FILE.match, names)) and not set(names) & set(index_files(folder).values())


def _complete(folder: Path, shards: list[re.Match[str]]) -> list[Path]:
    """Return the paths of all shards, from the numbers in their names. Raises StorageError if one is missing."""
    stems = {(match[1], match[3]) for match in shards}
    if len(stems) > 1:
        raise StorageError(f"{folder} holds shards of several checkpoints and no {INDEX}. Keep the shards of one.")
    ((stem, total),) = stems
    if int(total) > 100_000:
        raise StorageError(f"{folder}: a shard name announces {int(total):,} shards. Download the checkpoint again.")
    names = [f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    return _present(folder, names)


def _present(folder: Path, names: list[str]) -> list[Path]:
    """Return the paths of the named files. Raises StorageError if one is missing or outside the checkpoint."""
    paths = [path_inside(folder, name) for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise parts_missing(folder, missing, len(names), "shards")
    return paths


def _indexed(folder: Path, notes: list[str]) -> TensorTable:
    """Read the shards that the index names; each tensor comes from the shard that the index gives for it."""
    if (usual := _usually_indexed(folder)) is not None:
        return usual
    index, files = folder / INDEX, index_files(folder)
    names = sorted(set(files.values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        path_inside(folder, others[0])
        raise StorageError(f"{index} names {others[0][:200]!r}, which is not a safetensors file. {DOWNLOAD_AGAIN}")
    headers, runs, selected = [], new_runs(), False
    unlisted = 0
    for path in _present(folder, names):
        header = read_header(path, runs)
        shards = list(map(files.get, header.names))
        if shards.count(path.name) != len(shards):
            unlisted += shards.count(None)
            header = _selected(header, [shard in (None, path.name) for shard in shards])
            selected = True
        headers.append(header)
    if unlisted or sum(map(len, headers)) != len(files):
        stored = _check_unique(headers)
        if absent := [name for name in files if name not in stored]:
            raise StorageError(
                f"{folder / files[absent[0]]} lacks {absent[0][:200]!r}, which it holds by {INDEX} "
                f"({len(absent)} tensors in all). The files have different versions: download the checkpoint again."
            )
    if unlisted:
        notes.append(f"{unlisted} tensors stand in the shards but not in {INDEX}; they are counted")
    return TensorTable(headers, runs.all if runs.complete and not selected else None)


def _usually_indexed(folder: Path) -> TensorTable | None:
    """Read the shards of an index that names all tensors of all shards and nothing else; None for any other index.

    The entries that an index must have are written from the headers, and compared with it as texts.
    """
    lines = index_lines(folder)
    match = SHARD.match(lines.file) if lines else None
    if lines is None or match is None or int(match[3]) > len(lines.entries):
        return None
    count = int(match[3])
    names = [f"{match[1]}-{number:0{len(match[3])}d}-of-{match[3]}.safetensors" for number in range(1, count + 1)]
    paths = [path_inside(folder, name) for name in names]
    if not all(path.exists() for path in paths):
        return None
    headers, runs, total = [], new_runs(), 0
    unique: set[str] = set()
    for path in paths:
        header = read_header(path, runs)
        end = lines.middle + path.name
        if not lines.entries.issuperset([name + end for name in header.names]):
            return None
        headers.append(header)
        unique.update(header.names)
        total += len(header)
    # Only a compact header is known to have no name that looks like several entries.
    if not runs.complete or not total == len(unique) == len(lines.entries):
        return None
    return TensorTable(headers, runs.all)


def _selected(header: Header, chosen: list[bool]) -> Header:
    """Return the chosen tensors of a file."""
    names, forms, offsets = (
        list(compress(header.names, chosen)),
        list(compress(header.forms, chosen)),
        list(compress(header.offsets, chosen)),
    )
    return Header(header.path, names, forms, offsets)


def _merge(paths: list[Path]) -> TensorTable:
    runs = new_runs()
    headers = [read_header(path, runs) for path in paths]
    if len(headers) > 1:
        _check_unique(headers)
    return TensorTable(headers, runs.all if runs.complete else None)


def _check_unique(headers: list[Header]) -> set[str]:
    """Return the names of all tensors. Raises StorageError if two shards give a tensor of the same name."""
    names: set[str] = set()
    for header in headers:
        if not names.isdisjoint(header.names):
            name = next(name for name in header.names if name in names)
            raise StorageError(f"{header.path}: tensor {name[:200]!r} is also in another shard. {DOWNLOAD_AGAIN}")
        names.update(header.names)
    return names
