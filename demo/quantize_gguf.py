"""Quantizes a GGUF file with llama.cpp's own quantizer, through llama-cpp-python's bindings.

    python demo/quantize_gguf.py IN.gguf OUT.gguf Q4_K_M

No importance matrix is used, so the types that need one (IQ1, IQ2, Q2_K_S) are not offered. Prints how many tensors
have which type: where a width is not a multiple of the type's block, llama.cpp falls back to another type for that
tensor, so the type in the file's name may not be that of all its tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
from collections import Counter, deque
from pathlib import Path

import gguf
import llama_cpp
from outputs import UsageError, new_file, run
from tqdm import tqdm

TYPES = (
    "Q8_0",
    "Q6_K",
    "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K",
)  # fmt: skip

TENSOR_LINE = re.compile(r"\[\s*\d+/\s*\d+\]")
QUIET = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


def tensor_types(path: Path) -> Counter[str]:
    """Returns the number of tensors of each GGML type in the file."""
    return Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Runs llama.cpp's quantizer (UsageError with its last messages if it fails)."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    last_messages: deque[str] = deque(maxlen=3)
    total = sum(tensor_types(source).values())
    with tqdm(total=total, desc=kind, unit="tensor") as progress:

        @llama_cpp.llama_log_callback
        def log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
            line = text.decode("utf-8", "replace")
            if TENSOR_LINE.search(line):
                progress.update()
            elif line.strip():
                last_messages.append(line.strip())

        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        try:
            failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
        finally:
            llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))  # `log` is freed when this function returns
    if failed:
        raise UsageError(f"llama.cpp could not quantize {source} to {kind}: {' '.join(last_messages)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN.gguf", type=Path, help="an F16, BF16 or F32 file")
    parser.add_argument("target", metavar="OUT.gguf", type=Path, help="file to write (must not exist)")
    parser.add_argument("kind", metavar="TYPE", type=str.upper, choices=TYPES, help=", ".join(TYPES))
    options = parser.parse_args()
    if not options.source.is_file():
        raise UsageError(f"{options.source}: no such file")
    with new_file(options.target) as scratch:
        quantize(options.source, scratch, options.kind)
    counts = ", ".join(f"{count} {name}" for name, count in tensor_types(options.target).most_common())
    print(f"{options.target}: {counts}")


if __name__ == "__main__":
    run(main)
