"""What several benchmarks share: the command line's engine arguments, loading, random windows, and GPU memory."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import random
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

GIB = 1024**3


def add_common_options(parser: ArgumentParser, repeats: int) -> None:
    """Adds --repeats, --lock, --output and the engine's own arguments."""
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each way")
    parser.add_argument("--lock", type=Path, help="measure only while holding this file: benchmarks that share a GPU")
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument("engine", nargs="*", metavar="ENGINE_ARG=VALUE", help="arguments of the adapter")


def engine_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses NAME=VALUE pairs; a value is JSON where it parses as JSON, and text otherwise."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def load_adapter(name: str, path: str, **arguments: Any) -> Any:
    """Loads a model of this project by its harness name, whether the package is installed or not."""
    import lm_eval.models
    from lm_eval.api.registry import get_model

    from lmeval_ext import _register

    _register.register_models(lm_eval.models)
    return get_model(name)(pretrained=path, **arguments)


def random_windows(rng: random.Random, vocabulary: int, count: int, length: int) -> list[list[int]]:
    """Returns `count` windows of `length` random token ids."""
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def window_requests(windows: Sequence[list[int]]) -> list[Any]:
    """Returns one scoring request per window: every token but the first is scored."""
    from lmeval_ext.requests import window_request

    return [window_request(str(i), ids, 1, {}, (None, None, None)) for i, ids in enumerate(windows)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Runs `work` and returns (wall seconds until the GPU has finished too, its result)."""
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Holds the lock file while the block runs (created where missing); without one, just runs the block.

    Benchmarks that share a GPU load whenever they like, and measure while they hold the lock.
    """
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------- GPU memory; nothing happens on a CPU


def synchronize() -> None:
    """Waits until the GPU has finished its queue."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Frees the memory of objects that are no longer referenced, so that peaks belong to the measured model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Starts a new measurement of `peak_gib`."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most GPU memory allocated since `reset_peak`, in GiB; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
