"""`python -m lmeval_ext.storage PATH [--json]` prints the storage figures of a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lmeval_ext.storage import StorageError, StorageInfo, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for a checkpoint that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m lmeval_ext.storage", description="Bits per weight of a checkpoint, from its headers alone."
    )
    parser.add_argument("path", help="checkpoint folder, .safetensors file or .gguf file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        info = inspect(options.path)
    except StorageError as error:
        print(f"lmeval-ext: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(info.to_dict(), indent=2) if options.json else _text(info))
    return 0


def _text(info: StorageInfo) -> str:
    rows = [
        ("family", info.family or "unknown"),
        ("scheme", info.scheme or "unknown"),
        ("layer_bpw", _number(info.layer_bpw)),
        ("head_bpw", _number(info.head_bpw) + (" (tied embedding)" if info.tied else "")),
        ("vram_gb", _number(info.vram_gb)),
        ("file_bpw", _number(info.file_bpw)),
        ("weight_bytes", f"{info.weight_bytes:,}"),
    ]
    for part in info.excluded:
        elements = "unknown" if part.elements is None else f"{part.elements:,}"
        rows.append((f"not counted: {part.kind}", f"{part.bits // 8:,} bytes, {elements} elements"))
    rows += [("note", note) for note in info.notes]
    return "\n".join(f"{key:<24}{value}" for key, value in rows)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6f}"


if __name__ == "__main__":
    sys.exit(main())
