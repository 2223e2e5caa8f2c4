"""Puts the demo's scripts on the import path, since they run as files, and makes tiny checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .tiny import ROOT, write_model

sys.path.insert(0, str(ROOT / "demo"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_model(folder, tied=False)
    return folder


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-tied"
    write_model(folder, tied=True)
    return folder
