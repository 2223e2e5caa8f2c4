"""Starting vLLM's engine: in this process, and the size of its KV cache on a CPU."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lmeval_ext.models.record import GIB


@contextlib.contextmanager
def engine_in_this_process() -> Iterator[None]:
    """Starts vLLM's engine in this process; restores the random number generators and the environment afterwards.

    In a process of its own the engine begins as soon as some requests have arrived, so that its steps, and with them
    the rounding of 16-bit products, change from run to run (vLLM's docs/usage/reproducibility.md). In this process it
    seeds `random`, numpy and torch, with which the harness shuffles some tasks afterwards. vLLM reads the variable
    only at start.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    python, pytorch = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002 (the legacy state is the one that the harness seeds)
    was_unset = name not in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
        if was_unset:
            del os.environ[name]


def cpu_kv_bytes() -> int:
    """Size of the KV cache on a CPU in bytes: 4 GiB, or a quarter of the free memory if that is less.

    vLLM's own default reserves 92 % of a NUMA node, and fails to start if less is free.
    """
    import psutil

    return int(min(4 * GIB, psutil.virtual_memory().available // 4))


def cache_dtype(model: Any, arguments: dict[str, Any]) -> str | None:
    """Returns the type of the KV cache as the engine chose it: `auto` follows the checkpoint, or the model's dtype.

    model: vLLM's LLM. arguments: what it was given; used where the engine is in other processes.
    """
    config = getattr(getattr(model, "llm_engine", None), "vllm_config", None)
    if config is None:
        return None if arguments.get("kv_cache_dtype") == "auto" else arguments.get("kv_cache_dtype")
    chosen = str(config.cache_config.cache_dtype)
    return str(config.model_config.dtype).removeprefix("torch.") if chosen == "auto" else chosen
