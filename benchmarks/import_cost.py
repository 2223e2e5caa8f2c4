"""What the hook costs: starts of Python with and without it, in turn, and the difference of the medians.

    python benchmarks/import_cost.py [--runs 25]

"without" is LMEVAL_EXT_DISABLE=1 for harness imports; for plain starts the hook is compared with `-S`-free Python
whose hook is disabled too, so the two differ in nothing but our code.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": "pass",
    "import lm_eval": "import lm_eval",
    "import lm_eval.models, lm_eval.tasks": "import lm_eval.models, lm_eval.tasks",
}


def seconds(code: str, disabled: bool) -> float:
    """Wall time of one fresh interpreter."""
    env = {**os.environ, "LMEVAL_EXT_DISABLE": "1" if disabled else "0"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="pairs of starts a case")
    runs = parser.parse_args().runs
    print(f"{'case':40} {'with':>10} {'without':>10} {'difference':>12}   (medians of {runs})")
    for name, code in CASES.items():
        seconds(code, False), seconds(code, True)  # warm the file cache
        pairs = [(seconds(code, False), seconds(code, True)) for _ in range(runs)]
        ours, theirs = (statistics.median(side) * 1000 for side in zip(*pairs, strict=True))
        delta = statistics.median(a - b for a, b in pairs) * 1000
        print(f"{name:40} {ours:7.1f} ms {theirs:7.1f} ms {delta:+9.1f} ms")


if __name__ == "__main__":
    main()
