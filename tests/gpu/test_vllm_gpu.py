"""vLLM on a GPU; deselected elsewhere. Run by hand: pytest -m gpu tests/gpu/test_vllm_gpu.py

SMOLLM2_DIR names a folder with SmolLM2-135M-NVFP4A16, SmolLM2-135M-NVFP4 (demo/quantize_ct.py) and
SmolLM2-135M-NVFP4-modelopt (demo/to_modelopt.py); WIKITEXT2_DIR the data set's test split.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Set rather than profiled: these tests may share the GPU
KV_POOL = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 4 << 30}
# Hopper: Marlin, weight-only. Blackwell's native kernels have other names and quantize activations.
MARLIN, EMULATION = "MarlinNvFp4LinearKernel", "EmulationNvFp4LinearKernel"


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    from lmeval_ext import _hook

    _hook.install()  # a GPU host may have no installed package


def folder(name: str) -> str:
    return str(Path(os.environ["SMOLLM2_DIR"]) / f"SmolLM2-135M-{name}")


def perplexity(name: str, **arguments: Any) -> tuple[float, dict[str, Any]]:
    """Returns the perplexity over two windows, and `config.quantization`."""
    from tests.conftest import evaluate

    text = {"text_path": str(Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw")}
    settings = {**KV_POOL, "enforce_eager": True} | arguments
    found = evaluate("vllm_nvfp4", "wiki2_strided", limit=2, metadata=text, pretrained=folder(name), **settings)
    return found["results"]["wiki2_strided"]["token_perplexity,none"], found["config"]["quantization"]


def test_weight_only_kernel_is_reported_with_a_note() -> None:
    """Transformers gives 25.1708 for the weights alone."""
    for scheme in ("NVFP4A16", "NVFP4"):
        value, facts = perplexity(scheme)
        assert value == pytest.approx(25.1708, rel=1e-2)
        assert facts["kernel"] == MARLIN
        assert facts["scoring"] == "engine"
        assert any("weight-only" in note for note in facts["notes"]) == (scheme == "NVFP4")
        assert 0.1 < facts["weight_vram_gb"] < 1
        assert facts["weight_vram_gb"] < facts["peak_vram_gb"] < 20
        assert facts["kv_pool_gb"] > 1


def test_emulation_quantizes_activations() -> None:
    """Transformers in bfloat16 and float32 give 30.3 and 30.9 for a similar checkpoint; W4A4 rounds by 1–3 %."""
    value, facts = perplexity("NVFP4", linear_backend="emulation")
    assert value == pytest.approx(30.6, rel=0.06)
    assert facts["kernel"] == EMULATION
    assert not any("weight-only" in note for note in facts["notes"])


def test_modelopt_checkpoint_has_the_same_perplexity() -> None:
    ours, _ = perplexity("NVFP4")
    theirs, facts = perplexity("NVFP4-modelopt")
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert facts["kernel"] == MARLIN


# ------------------------------------------------------------------ eager for scores, compiled for text


def test_execution_is_eager_by_default_with_the_same_figures_to_the_last_bit() -> None:
    """Nobody decides about compiling: the engine starts at the first window, and compiles nothing."""
    by_default, facts = perplexity("NVFP4A16", enforce_eager=None)
    asked_for, eager = perplexity("NVFP4A16", enforce_eager=True)
    assert by_default == asked_for
    assert (facts["execution"], eager["execution"]) == ("eager", "eager")
    assert facts["weight_vram_gb"] == pytest.approx(eager["weight_vram_gb"], rel=0.02)


def test_text_gets_a_compiled_engine_and_scores_stay_the_same_after_it() -> None:
    """One engine after the other in one process: the first one's memory is released, also under profiling."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from lmeval_ext.requests import window_request

    model = get_model("vllm_nvfp4")(pretrained=folder("NVFP4A16"), max_model_len=2049, gpu_memory_utilization=0.6)
    windows = [window_request("w", ids, 1, {}, (None, None, None)) for ids in texts(model, 3, 1024)]
    before = model._loglikelihood_tokens(windows)
    request = Instance("generate_until", {}, ("Once upon", {"until": [], "max_gen_toks": 16, "do_sample": False}), 0)
    (text,) = model.generate_until([request])
    assert len(text) > 8
    assert model.describe().execution == "eager for log-probabilities, compiled for text"
    after = model._loglikelihood_tokens(windows)
    assert [s.logprobs for s in after] == [s.logprobs for s in before]


# ------------------------------------------------------------------ the workers' scores

ENGINES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "V2 runner": ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, {"enforce_eager": True}),
    "V1 runner": ({"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"enforce_eager": True}),
    "chunks of 512": ({}, {"enforce_eager": True, "max_num_batched_tokens": 512}),
    "CUDA graphs": ({}, {"enforce_eager": False}),
}


@pytest.fixture(scope="module", params=ENGINES)
def model(request: Any) -> Iterator[Any]:
    from lm_eval.api.registry import get_model

    environment, arguments = ENGINES[request.param]
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    built = get_model("vllm_nvfp4")(
        pretrained=folder("NVFP4A16"), max_model_len=2049, batch_size="auto", **KV_POOL, **arguments
    )
    yield built
    del built
    gc.collect()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def texts(model: Any, n: int, length: int) -> list[list[int]]:
    text = (Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw").read_text(encoding="utf-8")
    ids = model.tok_encode(text[: n * length * 6])
    return [ids[i * length : (i + 1) * length] for i in range(n)]


def test_workers_scores_equal_prompt_logprobs(model: Any) -> None:
    """In the same steps both read the same 16-bit logits; float32 log-softmax may round differently."""
    from lmeval_ext.models.vllm.client import ScoringPrompt

    assert model.describe().scoring == "engine"
    prompts = [ScoringPrompt(ids, 1) for ids in texts(model, 8, 2048)]
    ours = np.concatenate([s.logprobs for s in model.score_prompts(prompts)]).astype(float)
    theirs = np.concatenate([s.logprobs for s in model.score_by_vllm(prompts)]).astype(float)
    print(f"max |difference| {np.abs(ours - theirs).max():.2e}, mean {np.mean(ours - theirs):.2e}")
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.exp(-ours.mean()) == pytest.approx(np.exp(-theirs.mean()), rel=1e-5)


def test_batch_size_and_order_of_windows_do_not_change_scores(model: Any) -> None:
    from lmeval_ext.requests import window_request

    windows = [window_request("w", ids, 1, {}, (None, None, None)) for ids in texts(model, 8, 2048)]
    model.batch_size = 1
    one = model._loglikelihood_tokens(windows)
    model.batch_size = "auto"
    auto = model._loglikelihood_tokens(windows[::-1])[::-1]
    assert [s.logprobs for s in one] == [s.logprobs for s in auto]


def test_batch_composition_changes_a_window_only_by_rounding(model: Any) -> None:
    """Kernels choose shapes by a step's number of tokens: 16-bit results differ in the last bit, logits by 0.1."""
    from lmeval_ext.models.vllm.client import ScoringPrompt

    prompts = [ScoringPrompt(ids, 1) for ids in texts(model, 8, 2048)]
    together = np.concatenate([s.logprobs for s in model.score_prompts(prompts)]).astype(float)
    alone = np.concatenate([model.score_prompts([p])[0].logprobs for p in prompts]).astype(float)
    print(f"perplexity together {np.exp(-together.mean()):.6f}, alone {np.exp(-alone.mean()):.6f}")
    print(f"per token: rms {np.std(together - alone):.3f}, max {np.abs(together - alone).max():.3f}")
    assert np.exp(-together.mean()) == pytest.approx(np.exp(-alone.mean()), rel=2e-3)


def test_choices_that_share_a_cached_context_have_the_same_scores(model: Any) -> None:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    prompts = []
    for i, ids in enumerate(texts(model, 6, 400)):
        context = ids[: 16 * (10 + i)]  # ends at a block's border: the worst case
        prompts += [ScoringPrompt(context + ids[350 : 350 + n], len(context)) for n in (1, 4, 9, 30)]
    shared = [float(s.logprobs.sum()) for s in model.score_prompts(prompts, reuse_prefixes=True)]
    fresh = [float(s.logprobs.sum()) for s in model.score_prompts(prompts)]
    np.testing.assert_allclose(shared, fresh, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("vocabulary", [384, 49152, 128256])
def test_fused_log_softmax_equals_float64(dtype: str, vocabulary: int) -> None:
    """The Triton kernel agrees with float64; ties count for the first token; NaN stays NaN."""
    from lmeval_ext.models.target_logprobs import _fused, target_logprobs

    assert _fused() is not None
    torch.manual_seed(0)
    logits = (torch.randn(300, vocabulary + 64, device="cuda") * 6).to(getattr(torch, dtype))
    targets = torch.randint(vocabulary, (300,), device="cuda")
    logprobs, greedy = target_logprobs(logits, targets, vocabulary)
    expected = logits[:, :vocabulary].double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(logprobs.double().cpu(), expected.cpu(), rtol=2e-6, atol=5e-6)
    top = logits[:, :vocabulary].max(1).values
    assert (greedy <= (logits.gather(1, targets[:, None])[:, 0] == top)).all()
    ties = torch.zeros(2, vocabulary, device="cuda", dtype=logits.dtype)
    assert target_logprobs(ties, torch.tensor([0, 5], device="cuda"), vocabulary)[1].tolist() == [True, False]
    ties[0, 3] = float("nan")
    assert torch.isnan(target_logprobs(ties, torch.tensor([0, 5], device="cuda"), vocabulary)[0]).tolist() == [
        True,
        False,
    ]
