"""LongRoPE and everything else: a score depends on the window alone, not on the batch, the order or max_model_len."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm.long_rope import LongRope, original_context, switch
from lmeval_ext.requests import window_request
from tests.conftest import make_llama
from tests.models.vllm.tiny_models import ORIGINAL, make_model, plain_logprobs, random_windows

# One token less is fed than a window has: ORIGINAL + 1 is the longest window with short factors
LENGTHS = (150, 40, ORIGINAL, ORIGINAL + 1, ORIGINAL + 2, 90)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "longrope": make_model(root / "longrope", "longrope"),
        "llama": make_llama(root / "llama", hidden_size=128),
    }


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[Any]:
    models: dict[Any, Any] = {}

    def load(name: str, length: int) -> Any:
        if (name, length) not in models:
            models[name, length] = get_model("vllm_nvfp4")(
                pretrained=str(folders[name]), dtype="float32", max_model_len=length, kv_cache_memory_bytes=1 << 26
            )
        return models[name, length]

    yield load
    models.clear()
    gc.collect()


def scores(model: Any, windows: list[list[int]]) -> list[Any]:
    requests = [window_request("w", ids, 1, {}, (None, None, None)) for ids in windows]
    return [np.array(s.logprobs) for s in model._loglikelihood_tokens(requests)]


@pytest.mark.engine
@pytest.mark.parametrize(("name", "lengths"), [("longrope", (200, 152)), ("llama", (200,))])
def test_score_depends_on_the_window_alone(loaded: Any, folders: dict[str, Path], name: str, lengths: Any) -> None:
    """Alone, in any batch, in any order, with any sufficient max_model_len: as a plain Transformers forward."""
    windows = random_windows(*LENGTHS)
    expected = plain_logprobs(folders[name], windows)
    for length in lengths:
        model = loaded(name, length)
        for seed in range(2):
            order = random.Random(seed).sample(range(len(windows)), len(windows))
            together = scores(model, [windows[i] for i in order])
            prompts = [windows[i] for i in order]
            batched = model.score_prompts([_prompt(ids) for ids in prompts])
            for i, one, other in zip(order, together, batched, strict=True):
                np.testing.assert_allclose(one, expected[i], atol=1e-4)
                np.testing.assert_allclose(other.logprobs, expected[i], atol=1e-4)
        (alone,) = scores(model, windows[:1])
        np.testing.assert_allclose(alone, expected[0], atol=1e-4)


def _prompt(ids: list[int], first: int = 1) -> Any:
    from lmeval_ext.models.vllm.client import ScoringPrompt

    return ScoringPrompt(ids, first)


@pytest.mark.engine
def test_choices_of_one_cached_context_on_both_sides_of_the_border(loaded: Any, folders: dict[str, Path]) -> None:
    """A context's keys are rotated by short factors for one answer, and by long ones for a longer one."""
    model = loaded("longrope", 200)
    (context, answer) = random_windows(ORIGINAL - 2, 80)
    windows = [context + answer[:n] for n in (1, 40, 3, 70, 2)]
    expected = plain_logprobs(folders["longrope"], windows, first=len(context))
    model.batch_size = "auto"
    requests = [(None, context, ids[len(context) :]) for ids in windows]
    for (got, _), logprobs in zip(model._loglikelihood_tokens(requests, disable_tqdm=True), expected, strict=True):
        assert got == pytest.approx(logprobs.sum(), abs=1e-3)


@pytest.mark.engine
def test_text_is_generated_with_vllms_own_factors_whatever_was_scored(loaded: Any) -> None:
    model = loaded("longrope", 200)
    request = Instance("generate_until", {}, ("The city", {"until": [], "max_gen_toks": 12, "do_sample": False}), 0)
    scores(model, random_windows(150))
    after_long = model.generate_until([request], disable_tqdm=True)
    scores(model, random_windows(40))
    assert model._engine._long is False
    assert model.generate_until([request], disable_tqdm=True) == after_long
    assert model._engine._long is None


@pytest.mark.engine
def test_prompt_logprobs_refuses_what_needs_other_factors(loaded: Any, folders: dict[str, Path]) -> None:
    """vLLM's own way takes the factors of max_model_len for all prompts."""
    model = loaded("longrope", 200)
    (window,) = random_windows(150)
    (own,) = model.score_by_vllm([_prompt(window)])
    np.testing.assert_allclose(own.logprobs, plain_logprobs(folders["longrope"], [window])[0], atol=1e-4)
    with pytest.raises(UserError, match=r"needs the short factors .* set max_model_len to at most 64"):
        model.score_by_vllm([_prompt(random_windows(40)[0])])


def test_compiled_engine_refuses_prompts_on_the_other_side() -> None:
    rope = LongRope(context=64, long=True, switchable=False)
    rope.check([66, 200])
    with pytest.raises(UserError, match=r"65 tokens needs the short factors.*enforce_eager=False"):
        rope.check([200, 65])
    with pytest.raises(UserError, match=r"66 tokens needs the long factors.*above 64"):
        rope._replace(long=False).check([66])
    rope._replace(switchable=True).check([65, 66])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}}, 4096),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}, "max_position_embeddings": 8192}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096}}, None),
        ({"rope_scaling": None}, None),
    ],
)
def test_original_context_is_read_from_every_form_of_the_config(fields: dict[str, Any], expected: int | None) -> None:
    assert original_context(SimpleNamespace(**fields)) == expected


def test_switch_remembers_vllms_own_choice() -> None:
    rotary = SimpleNamespace(use_long_rope=True)
    model = SimpleNamespace(modules=lambda: [SimpleNamespace(), rotary])
    for long, expected in ((False, False), (True, True), (False, False), (None, True)):
        switch(model, long)
        assert rotary.use_long_rope is expected
