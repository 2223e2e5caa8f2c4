"""How vLLM's engine is started: in this process, and with how much KV cache on a CPU."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from lmeval_ext.models.record import GIB


@contextlib.contextmanager
def engine_in_this_process() -> Iterator[None]:
    """Start vLLM's engine in this process, and leave the process' random numbers and environment as they were.

    In a process of its own the engine starts on whatever has arrived, so that steps, and with them the rounding of
    16-bit products, change from run to run (vLLM's docs/usage/reproducibility.md). Here it seeds `random`, numpy and
    torch, with which the harness shuffles some tasks afterwards. vLLM reads the variable while it starts only.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    python, pytorch = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002 (the legacy state is the one that the harness seeds)
    mine = name not in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
        if mine:
            del os.environ[name]


def cpu_kv_bytes() -> int:
    """4 GiB of KV cache, or a quarter of the free memory where that is less.

    vLLM's own default reserves 92 % of a NUMA node and refuses to start where so much is not free.
    """
    import psutil

    return int(min(4 * GIB, psutil.virtual_memory().available // 4))
