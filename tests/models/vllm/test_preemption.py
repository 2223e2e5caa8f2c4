"""Scores of requests that vLLM preempts, because its cache is too small for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from tests.conftest import make_llama, random_ids
from tests.models.vllm.test_scoring import BLOCK, assert_equal, prompt_logprobs_scores


@pytest.mark.engine
def test_preempted_prompts_have_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine cache blocks are too few for six prompts: vLLM preempts some and computes them again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from lmeval_ext.models.vllm.client import ScoringPrompt

    preempted: list[Any] = []
    original = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), original(*a, **k))[1])
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
    assert preempted
    assert_equal(ours, prompt_logprobs_scores(crowded, prompts))
