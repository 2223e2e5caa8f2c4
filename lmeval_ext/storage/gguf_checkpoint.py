"""GGUF checkpoints: one file or the parts of a split one, their weights, and the name of the file type.

Roles come from `roles.GGUF_ROLES`, scheme names from the gguf package's `LlamaFileType`.
"""

from __future__ import annotations

import re
from pathlib import Path

from gguf.constants import LlamaFileType

from lmeval_ext.storage.foreign_gguf import PROJECTOR, not_a_model
from lmeval_ext.storage.gguf_header import GGUFHeader, read_gguf
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, parts_missing
from lmeval_ext.storage.roles import gguf_role_of
from lmeval_ext.storage.tensors import Weight

SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
GUESSED = 1024  # llama.h, LLAMA_FTYPE_GUESSED: a flag that is added to the file type


def read_gguf_checkpoint(path: Path) -> tuple[list[Weight], str | None, list[str]]:
    """Read the headers of a GGUF file, or of all parts of a split one (`path` may be any of them).

    Returns its weights, its scheme (None if unknown) and notes. Raises StorageError for missing or damaged parts.
    """
    headers, notes = _parts(path)
    first = headers[0]
    tensors = [tensor for header in headers for tensor in header.tensors]
    if not tensors:
        raise StorageError(f"{path} holds no tensors. Give the GGUF file of a model, not of a vocabulary.")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise StorageError(f"{path}: two parts hold a tensor of the same name. Download the files again.")
    architecture = first.metadata.get("general.architecture")
    blocks = first.integer(f"{architecture}.block_count")
    drafts = first.integer(f"{architecture}.nextn_predict_layers") or 0
    layers = blocks - drafts if blocks is not None else None
    kind = not_a_model(first.metadata)
    projector = kind == PROJECTOR
    if kind and not projector:
        raise StorageError(f"{path} is not a model: it holds {kind}. Give the GGUF file of the model.")
    weights = []
    for tensor in tensors:
        matrix = len(tensor.shape) >= 2
        role = "vision" if projector else gguf_role_of(tensor.name, matrix, layers)
        weights.append(Weight(tensor.name, role, 8 * tensor.nbytes, tensor.numel, tensor.dtype))
    return weights, _scheme(first, notes), notes


def _parts(path: Path) -> tuple[list[GGUFHeader], list[str]]:
    """Return the headers of all parts of the file `path`, and notes."""
    header = read_gguf(path)
    count = header.integer("split.count") or 0
    name = SPLIT.match(path.name)
    if count <= 1:
        if name and int(name[3]) > 1:
            raise StorageError(
                f"{path} is named as one of {int(name[3])} parts, but its metadata has no split.count. {DOWNLOAD_AGAIN}"
            )
        return [header], []
    if not name or int(name[3]) != count:
        raise StorageError(
            f"{path} is one of {count} parts, but is not named NAME-00001-of-{count:05d}.gguf. Restore the names "
            "that llama-gguf-split wrote, or merge the parts with it."
        )
    paths = [path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise parts_missing(path, missing, count, "parts")
    headers = [header if part == path else read_gguf(part) for part in paths]
    for number, part in enumerate(headers):
        if part.integer("split.no") != number or part.integer("split.count") != count:
            raise StorageError(f"{part.path} is not part {number + 1} of {count} by its own metadata. {DOWNLOAD_AGAIN}")
    announced, total = headers[0].integer("split.tensors.count"), sum(len(part.tensors) for part in headers)
    if announced not in (None, total):
        raise StorageError(
            f"{path}: the parts hold {total} tensors, but {announced} were announced. Download the files again."
        )
    return headers, [f"{count} split files"]


def _scheme(header: GGUFHeader, notes: list[str]) -> str | None:
    """Return the name of the file type, such as "Q4_K_M"; None, with a note, if the file does not have a known one."""
    number = header.integer("general.file_type")
    if number is None:
        notes.append("no general.file_type: scheme is null")
        return None
    try:
        name = LlamaFileType(number & ~GUESSED).name
    except ValueError:
        notes.append(f"general.file_type {number} is not known to the installed gguf package: scheme is null")
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
