"""What a test of `make fast` must not do: load an engine, start a browser, or start Ray.

`pytest --fast` watches this process' modules and the commands that it starts, and fails the test that broke the rule.
What child processes import is not seen.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# Tests that `make fast` leaves out
MARKERS = ("gpu", "engine", "browser", "ray", "slow")
MODULES = frozenset({"vllm", "llama_cpp", "exllamav2", "exllamav3", "transformers.modeling_utils", "ray", "selenium"})
COMMANDS = frozenset({"chromium", "chromium-browser", "google-chrome", "chromedriver", "ray", "raylet"})

# A file with such a line has no test for `make fast`
FILE_MARKED = re.compile(rf"^pytestmark = .*\bpytest\.mark\.({'|'.join(MARKERS)})\b", re.MULTILINE)

started: list[str] = []  # forbidden commands, in the order of their start
known: set[str] = set()  # forbidden modules that were reported, so that one test is blamed for each
watching: list[bool] = []
fast: list[bool] = []  # of one element under --fast, else empty


def examples(count: int) -> int:
    """Examples of a property test: `count`, or a fifth of them under --fast."""
    return max(20, count // 5) if fast else count


def leaves_out(path: Path) -> bool:
    """Returns whether every test of the file has one of MARKERS. Reads the source: importing it may load an engine."""
    if not (path.name.startswith("test_") and path.suffix == ".py"):
        return False
    return FILE_MARKED.search(path.read_text(encoding="utf-8")) is not None


def watch_commands() -> None:
    """Records every start of a forbidden command from now on. Idempotent."""
    if not watching:
        watching.append(True)
        sys.addaudithook(_audit)  # which cannot be removed


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        name = Path(str(arguments[0])).name
        if name in COMMANDS:
            started.append(name)


def loaded() -> list[str]:
    """Returns the forbidden modules that this process has imported since the last call, sorted."""
    new = (MODULES & sys.modules.keys()) - known
    known.update(new)
    return sorted(new)


def violation() -> str | None:
    """Returns what was done against the rule since the last call, in one line."""
    broken = [f"imported {name}" for name in loaded()] + [f"started {name}" for name in started]
    started.clear()
    if not broken:
        return None
    return f"{', '.join(broken)}: mark the test {', '.join(MARKERS[1:-1])} or slow, or drop the import"
