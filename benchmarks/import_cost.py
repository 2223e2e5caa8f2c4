"""What the hook costs: starts of Python with and without it, in turn, and the median of the differences.

    python benchmarks/import_cost.py [--runs 25]

Two bare environments are made that share this one's packages through a path file; one has our .pth file beside
it, the other does not (Python reads no .pth files of a folder that a path file names). They differ in nothing else.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOK = ROOT / "lmeval_ext_hook.pth"
CASES = {
    "python -c pass": "pass",
    "import lm_eval": "import lm_eval",
    "import lm_eval.models, lm_eval.tasks": "import lm_eval.models, lm_eval.tasks",
}


def environment(folder: Path, hook: bool) -> Path:
    """The interpreter of a new environment with this one's packages."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "a.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    if hook:
        shutil.copy(HOOK, site)
    return folder / "bin" / "python"


def seconds(python: Path, code: str) -> float:
    """Wall time of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="pairs of starts a case")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as scratch:
        with_hook = environment(Path(scratch) / "with", hook=True)
        without = environment(Path(scratch) / "without", hook=False)
        check = "import sys; sys.exit(not any('LmevalExt' in str(f) for f in sys.meta_path))"
        assert subprocess.run([str(with_hook), "-c", check], check=False).returncode == 0
        assert subprocess.run([str(without), "-c", check], check=False).returncode == 1
        print(f"{'case':40} {'with':>10} {'without':>10} {'difference':>12}   (medians of {runs}, {sys.version[:6]})")
        for name, code in CASES.items():
            seconds(with_hook, code), seconds(without, code)  # warm the file cache
            pairs = [(seconds(with_hook, code), seconds(without, code)) for _ in range(runs)]
            ours, theirs = (statistics.median(side) * 1000 for side in zip(*pairs, strict=True))
            delta = statistics.median(a - b for a, b in pairs) * 1000
            print(f"{name:40} {ours:7.1f} ms {theirs:7.1f} ms {delta:+9.1f} ms")


if __name__ == "__main__":
    main()
