"""Times the cost of the import hook: starts of Python with and without it, in turn; medians and their difference.

    python benchmarks/import_cost.py [--runs 25]

Makes two bare environments that share this one's packages through a path file; only one has our .pth file beside it
(Python reads no .pth files in a folder that a path file names). They differ in nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOK = ROOT / "lmeval_ext_hook.pth"
CASES = {
    "python -c pass": "pass",
    "import lm_eval": "import lm_eval",
    "import lm_eval.models, lm_eval.tasks": "import lm_eval.models, lm_eval.tasks",
}


def environment(folder: Path, hook: bool) -> Path:
    """Makes an environment with this one's packages and returns its interpreter."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "a.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    if hook:
        shutil.copy(HOOK, site)
    return folder / "bin" / "python"


def seconds(python: Path, code: str) -> float:
    """Returns the wall seconds of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="pairs of starts per case")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case (may be repeated)")
    options = parser.parse_args(argv)
    runs: int = options.runs
    with tempfile.TemporaryDirectory() as scratch:
        with_hook = environment(Path(scratch) / "with", hook=True)
        without = environment(Path(scratch) / "without", hook=False)
        check = "import sys; sys.exit(not any('LmevalExt' in str(f) for f in sys.meta_path))"
        assert subprocess.run([str(with_hook), "-c", check], check=False).returncode == 0
        assert subprocess.run([str(without), "-c", check], check=False).returncode == 1
        print(f"{'case':40} {'with':>10} {'without':>10} {'difference':>12}   (medians of {runs}, {sys.version[:6]})")
        for name in options.case or CASES:
            code = CASES[name]
            seconds(with_hook, code), seconds(without, code)  # warm the file cache
            pairs = [(seconds(with_hook, code), seconds(without, code)) for _ in range(runs)]
            ours, theirs = (statistics.median(side) * 1000 for side in zip(*pairs, strict=True))
            delta = statistics.median(a - b for a, b in pairs) * 1000
            print(f"{name:40} {ours:7.1f} ms {theirs:7.1f} ms {delta:+9.1f} ms")


if __name__ == "__main__":
    main()
