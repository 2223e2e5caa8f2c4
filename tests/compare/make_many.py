"""Writes many result files, to try `compare` at scale: ``python tests/compare/make_many.py FOLDER 10000``.

time compare table FOLDER > /dev/null
time compare plot FOLDER -o plot.png
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.compare.conftest import Folder, result

FAMILIES = ("EXL2", "EXL3", "GGUF", "VPTQ", "QTIP", "NVFP4", "AWQ", "GPTQ")


def make_many(path: Path, count: int) -> None:
    """Writes `count` models of eight families and one baseline, each in a folder as the harness does."""
    rng = random.Random(1)
    folder = Folder(path)
    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.17, 0.1)
    for number in range(count - 1):
        bpw = rng.uniform(2.0, 8.0)
        ppl = 8.17 + 60 * math.exp(-1.4 * bpw) * rng.uniform(0.8, 1.3)
        content = result(f"model {number}", FAMILIES[number % len(FAMILIES)], f"s{number}", bpw, ppl, 0.1)
        content["pretty_env_info"] = "PyTorch version: 2.13.0\n" * 160  # as long as the real ones
        folder.write(content)


if __name__ == "__main__":
    make_many(Path(sys.argv[1]), int(sys.argv[2]))
