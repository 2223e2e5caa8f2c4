"""vLLM throws requests out half way where its cache is too small for all: their scores must not suffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from tests.conftest import make_llama
from tests.models.vllm.test_scoring import BLOCK, assert_equal, own_way, random_ids


@pytest.mark.engine
def test_preempted_prompts_are_scored_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine cache blocks for six prompts: vLLM throws out requests half way and computes them again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from lmeval_ext.models.vllm.client import ScoringPrompt

    thrown: list[Any] = []
    original = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (thrown.append(1), original(*a, **k))[1])
    crowded = get_model("vllm_nvfp4")(
        pretrained=str(make_llama(tmp_path / "llama", hidden_size=128)),
        dtype="float32",
        max_model_len=200,
        block_size=BLOCK,
        kv_cache_memory_bytes=1 << 26,
        max_num_batched_tokens=96,
        num_gpu_blocks_override=9,
        long_prefill_token_threshold=24,
        scheduler_reserve_full_isl=False,
    )
    prompts = [ScoringPrompt(random_ids(n, n), 1) for n in (199, 33, 150, 180, 64, 199)]
    ours = crowded.score_prompts(prompts)
    assert thrown
    assert_equal(ours, own_way(crowded, prompts))
