"""One bench for all of these tests: a tiny model on every adapter."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.conformance.adapters import Bench


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("conformance"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on several
    yield made
    torch.set_num_threads(threads)
    made.loaded.clear()
    gc.collect()
