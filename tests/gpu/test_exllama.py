"""ExLlamaV3 and V2 on a GPU; deselected elsewhere. Run by hand: pytest -m gpu tests/gpu

LMEVAL_EXT_GPU_MODELS names a folder with SmolLM2-135M-w768 (bfloat16, Transformers) and its quantizations
SmolLM2-135M-w768-exl3-4.0bpw, -exl3-3.0bpw and -exl2-4.0bpw; WIKITEXT2_DIR names the folder of the test split.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, window_request

pytestmark = pytest.mark.gpu

WIDE = "SmolLM2-135M-w768"
# engine, checkpoint, perplexity over 20 windows of 2048 tokens, one every 512 (measured on an H100 with the engines'
# own tools; None: not measured), bits per weight of layers and head
CASES = [
    ("exllamav3", WIDE, 25.0538, 16.0, 16.0),
    ("exllamav3", f"{WIDE}-exl3-4.0bpw", 25.8657, 4.037704, 6.021160),
    ("exllamav3", f"{WIDE}-exl3-3.0bpw", 28.9772, 3.037704, 6.021160),
    ("exllamav2", f"{WIDE}-exl2-4.0bpw", None, None, None),
    ("exllamav2", WIDE, 25.0538, 16.0, 16.0),
]
SHOTS = "Question: What is the capital of France?\nAnswer: Paris\n\n" * 12


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: Any) -> Iterator[Any]:
    """(model, perplexity, layer_bpw, head_bpw); one at a time on the GPU."""
    from lmeval_ext import _hook

    _hook.install()  # a GPU host may have no installed package
    engine, name, *figures = request.param
    folder = Path(os.environ.get("LMEVAL_EXT_GPU_MODELS", ".")) / name
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not there; LMEVAL_EXT_GPU_MODELS names the folder with the checkpoints")
    import lm_eval.models
    from lm_eval.api.registry import get_model

    from lmeval_ext import _register

    _register.register_models(lm_eval.models)
    model = get_model(engine)(pretrained=str(folder), max_length=8192)
    yield (model, *figures)
    del model
    gc.collect()


def windows(n: int = 5, length: int = 2048) -> list[WindowRequest]:
    """Windows every 512 tokens of random ids: rounding does not depend on which they are."""
    ids = np.random.default_rng(0).integers(5, 49_000, size=512 * n + length).tolist()
    return [window_request(str(i), ids[i * 512 : i * 512 + length], 1, {}, (None, None, None)) for i in range(n)]


def logprobs_of(model: Any, requests: list[WindowRequest], batch_size: int | None = None) -> np.ndarray:
    original, model.batching.fixed_rows = model.batching.fixed_rows, batch_size
    try:
        return np.array([scores.logprobs for scores in model._loglikelihood_tokens(requests)], dtype=np.float64)
    finally:
        model.batching.fixed_rows = original


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, 0) for a in arguments]  # type: ignore[arg-type]


def test_perplexity_is_that_of_the_engines_own_tools(case: Any) -> None:
    from tests.conftest import evaluate

    model, perplexity, *_ = case
    text = str(Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw")
    metadata = {"text_path": text, "tokenizer": str(model.folder)}
    result = evaluate(model, "wiki2_strided", limit=20, metadata=metadata)
    measured = result["results"]["wiki2_strided"]["token_perplexity,none"]
    assert measured == pytest.approx(perplexity, rel=1e-3) if perplexity else 25 < measured < 35


def test_log_probabilities_are_those_of_the_engines_own_forward(case: Any) -> None:
    """One window; log-softmax in float32 over the logits of the engine's public forward."""
    import torch

    model = case[0]
    (window,) = windows(1)
    ids = torch.tensor([window.ids])
    with torch.inference_mode():
        own = model.engine.model
        logits = (
            own.forward(ids, {"attn_mode": "flash_attn_nc"})
            if model.engine_name == "exllamav3"
            else own.forward(ids, cache=None)
        )
        table = torch.log_softmax(logits[0, :-1, : model.vocabulary].float(), dim=-1)
        expected = table.gather(1, ids[0, 1:, None].to(table.device))[:, 0].cpu().numpy()
    measured = logprobs_of(model, [window])[0]
    # The same products in float16; float16 logits of size 16 to 32 have steps of 1/64
    np.testing.assert_allclose(measured, expected, atol=0.05)
    assert np.exp(-measured.mean()) == pytest.approx(np.exp(-expected.mean()), rel=1e-4)


def test_batches_change_nothing_but_rounding(case: Any) -> None:
    model, requests = case[0], windows()
    one, four = (logprobs_of(model, requests, n) for n in (1, 4))
    assert np.exp(-one.mean()) == pytest.approx(np.exp(-four.mean()), rel=1e-3)
    assert np.abs(one - four).max() < 0.5
    assert np.abs(one - four).mean() < 0.02


def test_shared_contexts_change_nothing_but_rounding(case: Any) -> None:
    model = case[0]
    capitals = {"Iceland": " Reykjavik", "Norway": " Oslo, a town in the south of the country", "Spain": " Madrid"}
    questions = [
        (f"{SHOTS}Question: What is the capital of {c}?\nAnswer:", a) for c in capitals for a in capitals.values()
    ]
    questions += [("The capital of Iceland is", " Reykjavik"), ("", "Iceland is an island")]
    requests = instances("loglikelihood", *questions)
    shared = model.loglikelihood(requests, disable_tqdm=True)
    shares, model.engine.shares, model.batching.fixed_rows = model.engine.shares, False, 1
    try:
        alone = model.loglikelihood(requests, disable_tqdm=True)
    finally:
        model.engine.shares, model.batching.fixed_rows = shares, None
    assert shares
    for (a, _), (b, _), (_, continuation) in zip(shared, alone, questions, strict=True):
        tokens = len(model.tok_encode(continuation, add_special_tokens=False))
        # float16 at other shapes: a logit moves by up to 0.1
        assert a == pytest.approx(b, abs=0.15 * tokens, rel=2e-3)


def test_greedy_generation_is_that_of_the_engines_own_generator(case: Any) -> None:
    model = case[0]
    prompts = [
        "The capital of France is",
        "Once upon a time",
        SHOTS + "Question: What is the capital of Spain?\nAnswer:",
    ]
    arguments = {"until": [], "max_gen_toks": 32, "do_sample": False}
    # One at a time: float16 rounding depends on batch composition, and may decide between two close tokens
    for prompt in prompts:
        requests = instances("generate_until", (prompt, arguments))
        (ours,) = model.generate_until(requests, disable_tqdm=True)
        assert ours == own_generation(model, prompt)
        # Scoring in between uses the cache's pages
        model.loglikelihood(instances("loglikelihood", (prompt, " Paris, of"), (prompt, " London is")))
        assert model.generate_until(requests, disable_tqdm=True) == [ours]


def own_generation(model: Any, prompt: str) -> str:
    """Generates in the engine's documented way, with its own tokenizer."""
    stop = list(model.generation_job(0, prompt, {"until": [], "max_gen_toks": 32})[0].stop_tokens)
    own = model.generator().wrapped
    if model.engine_name == "exllamav3":
        from exllamav3.generator.sampler import ArgmaxSampler

        greedy: dict[str, Any] = {"sampler": ArgmaxSampler()}
    else:
        from exllamav2.generator import ExLlamaV2Sampler

        greedy = {"gen_settings": ExLlamaV2Sampler.Settings.greedy()}
    text: str = own.generate(
        prompt=prompt, max_new_tokens=32, stop_conditions=stop, add_bos=False, completion_only=True, **greedy
    )
    return text


def test_stop_sequences_and_sampling(case: Any) -> None:
    model = case[0]
    greedy = {"until": [], "max_gen_toks": 32, "do_sample": False}
    (text,) = model.generate_until(instances("generate_until", ("Once upon a time", greedy)), disable_tqdm=True)
    stop = text[10:13]
    (cut,) = model.generate_until(
        instances("generate_until", ("Once upon a time", greedy | {"until": [stop]})), disable_tqdm=True
    )
    assert cut == text.split(stop)[0]
    sampled = {"until": ["."], "max_gen_toks": 24, "do_sample": True, "temperature": 1.2, "top_p": 0.95, "top_k": 100}
    texts = model.generate_until(
        instances("generate_until", *((f"Story {i}:", sampled) for i in range(12))), disable_tqdm=True
    )
    assert len(set(texts)) > 6
    assert not any("." in text for text in texts)


def test_batches_shrink_when_memory_runs_out(case: Any, monkeypatch: Any) -> None:
    import torch

    model, requests = case[0], windows(6)
    expected = logprobs_of(model, requests, 1)
    forward = model.engine.hidden

    def short(ids: Any, keep: int) -> Any:
        if ids.shape[0] > 2:
            torch.empty(1 << 42, dtype=torch.int8, device="cuda")  # 4 TiB
        return forward(ids, keep)

    tokens, logit_bytes = model.batching.tokens, model.batching.logit_bytes
    monkeypatch.setattr(model.engine, "hidden", short)
    try:
        assert np.abs(logprobs_of(model, requests) - expected).mean() < 0.02
        assert model.batching.tokens < tokens
    finally:
        model.batching.tokens, model.batching.logit_bytes = tokens, logit_bytes


def test_storage_and_memory_are_reported(case: Any) -> None:
    model, _, layer_bpw, head_bpw = case
    logprobs_of(model, windows(2))
    facts = model.get_model_info()["quantization"]
    if layer_bpw is not None:  # EXL2's widths follow a measurement, which differs from run to run
        assert (facts["layer_bpw"], facts["head_bpw"]) == pytest.approx((layer_bpw, head_bpw), rel=1e-6)
    if model.engine_name == "exllamav3":
        assert (facts["layer_bpw"], facts["head_bpw"]) == pytest.approx(
            model.engine.model.get_storage_info()[:2], rel=1e-9
        )
    assert facts["kernel"] == {16.0: "fp16"}.get(layer_bpw, model.engine_name.replace("exllamav", "exl"))
    assert facts["scoring"] == "engine"
    assert facts["weight_bytes"] / 1024**3 < facts["peak_vram_gb"] < 20
    assert facts["kv_pool_gb"] > 0


def test_quantized_cache_and_bad_arguments(case: Any) -> None:
    """A quantized cache works; bad arguments are errors."""
    from lm_eval.api.registry import get_model

    model = case[0]
    adapter = get_model(model.engine_name)
    for arguments, words in (
        ({"cache_bits": 5 if model.engine_name == "exllamav2" else 9}, "cache_bits="),
        ({"device": "cpu"}, "runs on GPUs only"),
        ({"nonsense": 1}, "nonsense=1 is not an argument"),
    ):
        with pytest.raises(UserError, match=words):
            adapter(pretrained=str(model.folder), **arguments)
    small = adapter(pretrained=str(model.folder), cache_bits=4, cache_tokens=1024, max_length=2048)
    greedy = {"until": [], "max_gen_toks": 8, "do_sample": False}
    (text,) = small.generate_until(instances("generate_until", ("The capital of France is", greedy)), disable_tqdm=True)
    assert text
    with pytest.raises(UserError, match="the KV cache holds 1024; set cache_tokens="):
        small.generate_until(instances("generate_until", (SHOTS * 12, greedy)), disable_tqdm=True)
    assert small.get_model_info()["quantization"]["kv_cache_dtype"] == "q4"
