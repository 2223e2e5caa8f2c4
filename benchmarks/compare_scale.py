"""Times how `compare table` and `compare plot` grow with the number of result files.

    python benchmarks/compare_scale.py [SIZES …] [--report]

Writes result files as the harness does (6.5 kB each, one folder per model), runs each command in its own process, as a
user would, and prints the seconds of the best of several runs and the growth: the exponent b of seconds ~ files^b from
one size to the next, without the time of `compare --help`; b = 1 is linear. Goals at 10,000 files on 2 cores: table
below 5 s, plot below 10 s.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
from tests.compare.make_many import make_many

SIZES = (1_000, 2_500, 5_000, 10_000)
GOALS = {"table": 5.0, "plot": 10.0}


def seconds(arguments: list[str], repeats: int) -> float:
    """Returns the wall seconds of ``compare ARGUMENTS``, the best of several runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "compare", *arguments], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="numbers of files, rising")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--report", action="store_true", help="time the report as well (once; it holds every row)")
    options = parser.parse_args(argv)
    start = seconds(["--help"], options.repeats + 2)
    print(f"{os.cpu_count()} cores; compare --help {start:.3f} s")
    titles = f"{'files':>7} {'table s':>9} {'growth':>7} {'plot s':>9} {'growth':>7}"
    print(titles + "   report s" * options.report)
    before: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in options.sizes:
            folder = Path(name, str(size))
            make_many(folder, size)
            commands = {"table": ["table", str(folder)], "plot": ["plot", str(folder), "-o", f"{name}/plot.png"]}
            cells = [f"{size:>7,}"]
            for command, arguments in commands.items():
                taken = seconds(arguments, options.repeats) - start
                cells += [f"{taken + start:>9.2f}", f"{growth(before.get(command), size, taken):>7}"]
                before[command] = (size, taken)
            if options.report:
                cells.append(f"{seconds(['report', str(folder), '-o', f'{name}/report.html'], 1):>10.2f}")
            print(" ".join(cells), flush=True)
    met = all(before[command][1] + start < goal for command, goal in GOALS.items())
    if options.sizes[-1] == SIZES[-1]:
        print("goals met" if met else "GOALS MISSED", "(table < 5 s, plot < 10 s at 10,000 files)")
    return 0 if met or options.sizes[-1] != SIZES[-1] else 1


def growth(before: tuple[int, float] | None, size: int, taken: float) -> str:
    """Returns the exponent between two sizes; empty for the first, and for times below that of --help."""
    if before is None or min(before[1], taken) <= 0:
        return ""
    return f"{math.log(taken / before[1]) / math.log(size / before[0]):.2f}"


if __name__ == "__main__":
    sys.exit(main())
