"""Makes small stores of random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.logits_code import encode
from lmeval_ext.divergence.plan import head_facts
from lmeval_ext.divergence.store import Manifest, ReferenceStore, StoredWindow
from lmeval_ext.requests import window_key

VOCABULARY, WIDTH = 11, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns normally distributed float32 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_head(seed: int = 0) -> OutputHead:
    return OutputHead(random(VOCABULARY, WIDTH, seed=seed), random(VOCABULARY, seed=seed + 1), 6.0, 0.5)


def manifest(mode: str = "hidden", head: OutputHead | None = None, **model: Any) -> Manifest:
    facts = {"label": "first", "engine": "tiny", "engine_version": "1", "dtype": "float32", "weights_sha256": "ab"}
    head_fields = head_facts(head or some_head()) if mode == "hidden" else {}
    return Manifest({**facts, **model}, mode, VOCABULARY, [1, 2, 3], **head_fields)


def window(number: int = 0, tokens: int = 3, mode: str = "hidden") -> StoredWindow:
    states = {"hidden": random(tokens, WIDTH, seed=number)}
    if mode == "logits":
        states = encode(random(tokens, VOCABULARY, seed=number))
    floats = ("logprobs", "kld", "reference_logprobs", "model_logprobs", "confidence")
    scores = {name: random(tokens, seed=100 * number + i) for i, name in enumerate(floats)}
    scores |= {name: random(tokens, seed=200 * number + i) > 0 for i, name in enumerate(("greedy", "agree"))}
    return StoredWindow(window_key([number, 5, 6, 7], 1), states, scores)


def made(folder: Path, windows: int = 2, mode: str = "hidden") -> ReferenceStore:
    store = ReferenceStore.create(folder, manifest(mode))
    if mode == "hidden":
        store.write_head(some_head())
    for number in range(windows):
        store.write(window(number, mode=mode))
    return store


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def same(a: StoredWindow, b: StoredWindow) -> bool:
    return a.key == b.key and equal(a.states, b.states) and equal(a.scores, b.scores)
