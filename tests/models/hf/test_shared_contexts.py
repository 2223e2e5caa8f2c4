"""Contexts that `hf_quant` computes once: how many tokens are computed, and models that the harness has to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from transformers import LlamaConfig, Mamba2Config, Mamba2ForCausalLM, MistralConfig, MistralForCausalLM

from lmeval_ext.models.hf.shared_contexts import can_share
from tests.conftest import VOCABULARY, make_tokenizer, random_ids

pytestmark = pytest.mark.engine


def questions() -> list[Any]:
    """Returns three questions of four answers; each has the same 60 tokens, 20 of its own, and 3 per answer."""
    shots = random_ids(60, 0)
    return [(None, shots + random_ids(20, q), random_ids(3, 100 + 4 * q + c)) for q in (1, 2, 3) for c in range(4)]


def stock_scores(folder: Path, requests: list[Any]) -> list[tuple[float, bool]]:
    """Returns scores of the harness' `hf`, one request at a time."""
    stock = get_model("hf")(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    return [stock._loglikelihood_tokens([r], disable_tqdm=True)[0] for r in requests]


def assert_like(ours: list[Any], theirs: list[Any]) -> None:
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=1e-5)
    assert [g for _, g in ours] == [g for _, g in theirs]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_shared_tokens_are_computed_once(tiny_llama: Path, batch_size: int) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", device="cpu", batch_size=batch_size)
    computed: list[int] = []
    model.model.register_forward_pre_hook(lambda _m, _a, k: computed.append(k["input_ids"].numel()), with_kwargs=True)
    requests = questions()
    scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
    # Each answer takes 3 tokens: the context's last one, and all of the answer's but its last
    assert sum(computed) == 60 + 3 * 19 + 12 * 3
    assert_like(scores, stock_scores(tiny_llama, requests))


def test_scores_go_to_the_request_cache(tiny_llama: Path) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", device="cpu")
    kept: list[Any] = []
    model.cache_hook.add_partial = lambda kind, key, answer: kept.append((kind, key, answer))
    requests = [((f"c{i}", "a"), *r[1:]) for i, r in enumerate(questions())]
    scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert sorted(kept) == sorted(("loglikelihood", r[0], a) for r, a in zip(requests, scores, strict=True))


@pytest.mark.parametrize("kind", ["sliding window", "recurrent"])
def test_models_with_other_caches_equal_stock_hf(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
    if kind == "sliding window":
        config = MistralConfig(
            **common, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
            max_position_embeddings=256,
        )  # fmt: skip
        MistralForCausalLM(config).save_pretrained(tmp_path)
    else:
        config = Mamba2Config(**common, num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=16)
        Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    model = get_model("hf_quant")(pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=4)
    requests = questions()
    assert_like(model._loglikelihood_tokens(requests, disable_tqdm=True), stock_scores(tmp_path, requests))


def test_rotary_embeddings_that_depend_on_the_length_are_not_shared() -> None:
    def config(kind: str) -> Any:
        return LlamaConfig(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})

    assert can_share(config("linear"))
    assert not can_share(config("dynamic"))
