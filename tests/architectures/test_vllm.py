"""Architectures through `vllm_nvfp4` on a CPU: log-probabilities of a plain forward, and references across engines.

An engine takes some ten seconds to start, so a default run covers the kinds in which one may go wrong: a soft-cap,
windows, experts, sinks, scales, latent attention, states. `LMEVAL_EXT_ALL_ARCHITECTURES=1` runs all.
"""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.storage.kv_cache import kv_cache
from tests.architectures.checkpoints import ARCHITECTURES, logprobs, windows
from tests.architectures.conftest import (
    Checkpoint,
    assert_equal_logprobs,
    assert_no_divergence,
    measure,
    requests,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHOSEN = ("gemma2", "qwen3-moe", "gpt-oss", "granite", "deepseek-v3", "falcon-h1", "padded-vocabulary")
# What this engine cannot run on a CPU, and what it says
REFUSED = {
    "llama-dynamic": "dynamic scaling",
    "qwen3-next": "bfloat16",
    "jamba": "no kernel for Mamba",
    "qwen3.5": "torchvision",
    "gemma3-wrapper": "torchvision",
    "qwen2.5-vl": "torchvision",
}
# vLLM runs these by Transformers' own classes, and decorates them so that Transformers cannot run them any more
DECORATED = {"olmo2", "smollm3", "starcoder2"}
# A difference of vLLM's own, which its test below explains
EXPLAINED = {"cohere2"}
ALL = bool(os.environ.get("LMEVAL_EXT_ALL_ARCHITECTURES"))
NAMES = [name for name in ARCHITECTURES if name not in REFUSED and name not in EXPLAINED]


def load(made: Checkpoint) -> Any:
    return get_model("vllm_nvfp4")(
        pretrained=str(made.folder), dtype="float32", max_model_len=100, kv_cache_memory_bytes=1 << 26, max_num_seqs=2
    )


def kept_bytes(model: Any) -> tuple[dict[int | None, int], int]:
    """What vLLM's specifications of the layers' caches say: bytes per token by window, and bytes of states."""
    (specs,) = model.model.collective_rpc(lambda worker: worker.get_kv_cache_spec())
    groups: dict[int | None, int] = {}
    states = 0
    for spec in specs.values():
        if hasattr(spec, "shapes"):
            sizes = zip(spec.shapes, spec.dtypes, strict=True)
            states += sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)
        else:
            window = getattr(spec, "sliding_window", None)
            groups[window] = groups.get(window, 0) + spec.page_size_bytes // spec.block_size
    return groups, states


@pytest.mark.parametrize("name", NAMES if ALL else CHOSEN)
def test_log_probabilities_equal_a_plain_forward_and_references_agree(
    name: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """And the cache has the bytes of vLLM's specifications."""
    made = checkpoint(name)
    model = load(made)
    assert_no_divergence(measure(model, made.store), made.expected)  # written by hf_quant
    model.reference_arguments = ReferenceArguments(save_reference=str(tmp_path / "store"))
    scores = model.score_checked(requests())
    kept = kept_bytes(model)
    del model
    gc.collect()
    assert_equal_logprobs(scores, made.expected)
    cache = kv_cache(made.folder)
    assert ({window: size for size, window in cache.groups or ()}, cache.state_bytes) == kept
    assert ReferenceStore.open(str(tmp_path / "store")).manifest.mode == "hidden"
    if name not in DECORATED:
        assert_no_divergence(made.measure(str(tmp_path / "store")), made.expected)


@pytest.mark.parametrize("name", REFUSED if ALL else ["llama-dynamic", "qwen3-next", "jamba"])
def test_architecture_that_vllm_cannot_run_is_refused_in_one_line(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        load(checkpoint(name))
    assert "\n" not in str(error.value)


def test_window_of_cohere_2_is_one_token_longer_than_transformers_and_llama_cpps(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    """vLLM follows the model's training (model_executor/models/commandr.py); Transformers the number in config.json."""
    made = checkpoint("cohere2")
    changed = copy.deepcopy(made.plain.args[0])  # type: ignore[attr-defined]
    changed.config.sliding_window += 1
    for layer in changed.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and changed.config.sliding_window
    expected = [logprobs(changed, ids) for ids in windows()]
    model = load(made)
    scores = model.score_checked(requests())
    del model
    gc.collect()
    assert_equal_logprobs(scores, expected)
    assert max(np.abs(s.logprobs - e).max() for s, e in zip(scores, made.expected, strict=True)) > 0.01
