"""Identifies a checkpoint's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path


def weights_sha256(path: str | None) -> str | None:
    """SHA-256 over a checkpoint's weight files: names, sizes and samples of their bytes (all bytes would take minutes).

    path: a folder or one file; None without a checkpoint.
    """
    if path is None:
        return None
    root = Path(path)
    files = sorted(p for p in root.iterdir() if p.suffix in (".safetensors", ".gguf")) if root.is_dir() else [root]
    digest = hashlib.sha256()
    piece, pieces = 1 << 16, 64
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for i in range(pieces):
                stream.seek(max(0, size - piece) * i // (pieces - 1))
                digest.update(stream.read(piece))
    return digest.hexdigest()
