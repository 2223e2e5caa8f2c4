"""The rule of `make fast`: no test of it loads an engine or starts a browser or Ray."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests import fast_guard


def test_imported_engine_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_guard, "MODULES", frozenset({"stands_for_an_engine"}))
    monkeypatch.setattr(fast_guard, "known", set())
    assert fast_guard.violation() is None
    monkeypatch.setitem(sys.modules, "stands_for_an_engine", types.ModuleType("stands_for_an_engine"))
    assert "imported stands_for_an_engine" in (fast_guard.violation() or "")
    assert fast_guard.violation() is None  # one test is blamed


def test_started_browser_is_a_violation_once(tmp_path: Path) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    fast_guard.watch_commands()
    subprocess.run([str(browser), "--headless"], check=True)
    assert "started chromium" in (fast_guard.violation() or "")
    assert "chromium" not in (fast_guard.violation() or "")


@pytest.mark.parametrize(
    ("mark", "left_out"),
    [
        ("pytest.mark.engine", True),
        ("[pytest.mark.usefixtures('x'), pytest.mark.slow]", True),
        ("pytest.mark.filterwarnings('ignore')", False),
        ("pytest.mark.slowly", False),
    ],
)
def test_file_with_a_marker_for_all_its_tests_is_left_out(tmp_path: Path, mark: str, left_out: bool) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(f"import pytest\n\npytestmark = {mark}\n")
    assert fast_guard.leaves_out(file) is left_out
    file.write_text(f"import pytest\n\n# pytestmark = {mark}\n")
    assert not fast_guard.leaves_out(file)
