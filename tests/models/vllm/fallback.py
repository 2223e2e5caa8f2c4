"""A loaded `vllm_nvfp4` model without scores from vLLM's workers, as where its model runner is unknown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def without_worker_scores(model: Any, reason: str) -> Iterator[None]:
    """Makes a loaded model score through vLLM's prompt_logprobs, for `reason`.

    Sets the adapter's two private attributes here alone: through public arguments, another engine would have to load.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_engine", None)
        patch.setattr(model, "_why_not_engine", reason)
        yield
