"""Fingerprints of checkpoints, tokenizers and texts: by their content, not by their path or dates.

A checkpoint's fingerprint covers its small files completely, the headers and sizes of its weight files, and samples
spread over the weights: two quantizations of one model in one format have the same headers and sizes, and differ in
nearly every block. Reading all of a 70B checkpoint would take minutes; this takes milliseconds per file. A change of
a few bytes between samples is not noticed; `compare run -cc` removes results whatever the fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

# Files up to this size (config, tokenizer and index files) are read completely, weights never.
_READ_COMPLETELY = 64 * 1024 * 1024
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz"}
_SMALL = {".json", ".jinja", ".txt", ".model", ".py", ".yaml", ".yml"}
_NOT_CONTENT = {"README.md", "LICENSE", ".gitattributes", "generation_config.json"}
_TOKENIZER = re.compile(r"^(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|config\.json)|\.model$")
_SPLIT_GGUF = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<parts>\d{5})\.gguf$")

_SAFETENSORS_LIMIT = 100 * 1024 * 1024  # the format's own limit for a header
_HEAD = 16 * 1024 * 1024  # covers the header of a GGUF file, with its vocabulary
_SAMPLE, _SAMPLES = 4096, 64  # bytes per sample, samples per file


@lru_cache(maxsize=4096)
def fingerprint(path: Path, tokenizer_only: bool = False) -> str:
    """The sha256 of the content of `path`: a file, or the files directly in a folder.

    tokenizer_only: of a folder, only the files that make up a tokenizer. Raises OSError where a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in _files(path, tokenizer_only):
        size = file.stat().st_size
        name = "" if file == path else file.name  # a single file may be renamed, a folder's files may not
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as stream:
            if size <= _READ_COMPLETELY and file.suffix not in _WEIGHTS:
                digest.update(stream.read(size))
            else:
                _sample(digest, stream.fileno(), size, file.suffix)
    return digest.hexdigest()


def _files(path: Path, tokenizer_only: bool) -> list[Path]:
    """The files that count, by name; of a split GGUF file, all parts."""
    if path.is_file():
        split = _SPLIT_GGUF.match(path.name)
        return sorted(path.parent.glob(f"{split['stem']}-*-of-{split['parts']}.gguf")) if split else [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name not in _NOT_CONTENT)
    if tokenizer_only:
        return [p for p in files if _TOKENIZER.search(p.name)]
    return [p for p in files if p.suffix in _WEIGHTS | _SMALL]


def _sample(digest: Any, descriptor: int, size: int, suffix: str) -> None:
    """Add a weight file's header and samples spread evenly over the rest to `digest`. size: of the file, in bytes."""
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
