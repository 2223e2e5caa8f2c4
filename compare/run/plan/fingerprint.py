"""What makes two checkpoints, tokenizers or texts the same: their content, not their place or their dates.

A checkpoint is told by its small files (whole), by the headers and sizes of its weight files, and by samples spread
over the weights: two quantizations of one model in one format have the same headers and sizes, and differ in nearly
every block. Reading all of a 70B checkpoint would take minutes; this takes milliseconds a file. A change of some
bytes between samples goes unseen; `compare run -cc` forgets results whatever the key says.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

# Read whole below this; config, tokenizer and index files are.
_WHOLE = 64 * 1024 * 1024
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz"}
_SMALL = {".json", ".jinja", ".txt", ".model", ".py", ".yaml", ".yml"}
_NOT_CONTENT = {"README.md", "LICENSE", ".gitattributes", "generation_config.json"}
_TOKENIZER = re.compile(r"^(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|config\.json)|\.model$")
_SPLIT_GGUF = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<parts>\d{5})\.gguf$")

_SAFETENSORS_LIMIT = 100 * 1024 * 1024  # the format's own limit for a header
_HEAD = 16 * 1024 * 1024  # holds the header of a GGUF file, its vocabulary included
_SAMPLE, _SAMPLES = 4096, 64


@lru_cache(maxsize=4096)
def fingerprint(path: Path, tokenizer_only: bool = False) -> str:
    """sha256 over what `path` (a file or a folder; its own level only) holds.

    tokenizer_only: of a folder, the files that a tokenizer is made from. Raises OSError where it cannot be read.
    """
    digest = hashlib.sha256()
    for file in _files(path, tokenizer_only):
        size = file.stat().st_size
        name = "" if file == path else file.name  # a file is the same under another name, a folder's files are not
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as stream:
            if size <= _WHOLE and file.suffix not in _WEIGHTS:
                digest.update(stream.read(size))
            else:
                _sample(digest, stream.fileno(), size, file.suffix)
    return digest.hexdigest()


def _files(path: Path, tokenizer_only: bool) -> list[Path]:
    if path.is_file():
        split = _SPLIT_GGUF.match(path.name)
        return sorted(path.parent.glob(f"{split['stem']}-*-of-{split['parts']}.gguf")) if split else [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name not in _NOT_CONTENT)
    if tokenizer_only:
        return [p for p in files if _TOKENIZER.search(p.name)]
    return [p for p in files if p.suffix in _WEIGHTS | _SMALL]


def _sample(digest: Any, descriptor: int, size: int, suffix: str) -> None:
    head = _HEAD
    if suffix == ".safetensors":
        start = os.pread(descriptor, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        head = 8 + min(length, _SAFETENSORS_LIMIT)
    digest.update(os.pread(descriptor, min(head, size), 0))
    rest = size - head
    if rest <= 0:
        return
    for i in range(_SAMPLES):
        digest.update(os.pread(descriptor, _SAMPLE, head + max(0, rest - _SAMPLE) * i // (_SAMPLES - 1)))
