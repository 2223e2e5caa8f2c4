"""When vLLM's engine starts, whether it compiles, and what the result says about it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.requests import window_request
from tests.conftest import make_llama

pytestmark = pytest.mark.engine

SMALL = {"dtype": "float32", "max_model_len": 200, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama-128", hidden_size=128)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """enforce_eager of each engine as it is started; the engines themselves are eager, as compiling takes minutes."""
    from lmeval_ext.models.vllm import execution

    values: list[bool] = []

    def start(self: Any, enforce_eager: bool) -> None:
        values.append(enforce_eager)
        original(self, True)

    original = execution.LateLLM.start
    monkeypatch.setattr(execution.LateLLM, "start", start)
    return values


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU nobody decides about compiling; on a CPU the adapter's default does."""
    from lmeval_ext.models.vllm import adapter

    monkeypatch.setattr(adapter, "user_decides", lambda arguments: False)
    yield
    gc.collect()


def window(n: int = 50) -> Any:
    return window_request("w", list(range(2, 2 + n)), 1, {}, (None, None, None))


def prompt(text: str = "The") -> Instance:
    return Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}), 0)


@pytest.mark.parametrize(
    ("arguments", "decided"),
    [
        ({}, False),
        ({"enforce_eager": None, "max_model_len": 9}, False),
        ({"enforce_eager": False}, True),
        ({"enforce_eager": True}, True),
        ({"compilation_config": 0}, True),
        ({"optimization_level": 3}, True),
    ],
)
def test_user_decides_by_any_argument_about_compiling(arguments: dict[str, Any], decided: bool) -> None:
    from lmeval_ext.models.vllm.execution import user_decides

    assert user_decides(arguments) is decided


def test_engine_starts_at_the_first_request_and_again_for_text(
    folder: Path, started: list[bool], undecided: None
) -> None:
    """Windows and log-likelihoods share an eager engine, text gets a compiled one, and scores are the same after it."""
    model = get_model("vllm_nvfp4")(pretrained=str(folder), **SMALL)
    assert started == []
    assert (model.max_length, model.window_limit) == (200, 199)
    with pytest.raises(UserError, match="beyond this model's context"):
        model._loglikelihood_tokens([window(200)])
    with pytest.raises(UserError, match="has no tokens"):
        model._loglikelihood_tokens([(("a", ""), [3], [])], disable_tqdm=True)
    assert started == []  # mistakes cost no engine
    (before,) = model._loglikelihood_tokens([window()])
    model._loglikelihood_tokens([(None, [3, 4], [5])], disable_tqdm=True)
    assert started == [True]
    assert model.describe().execution == "eager"
    first = model.generate_until([prompt()])
    assert started == [True, False]
    assert model.generate_until([prompt()]) == first
    facts = model.describe()
    assert facts.execution == "eager for log-probabilities, compiled for text"
    assert facts.scoring == "engine"
    (after,) = model._loglikelihood_tokens([window()])
    assert started == [True, False, True]
    assert after.logprobs == before.logprobs


def test_user_decision_starts_one_engine_at_once(folder: Path, started: list[bool]) -> None:
    """On a CPU eager is the adapter's own decision. To the last bit the same as an engine that started late."""
    model = get_model("vllm_nvfp4")(pretrained=str(folder), enforce_eager=True, **SMALL)
    assert started == []
    assert type(model.model).__name__ == "LLM"
    model._loglikelihood_tokens([window()])
    model.generate_until([prompt()])
    assert model.describe().execution == "eager"
    del model
    gc.collect()


def test_unused_engine_is_not_started_to_describe_it(folder: Path, started: list[bool], undecided: None) -> None:
    model = get_model("vllm_nvfp4")(pretrained=str(folder), **SMALL)
    facts = model.describe()
    assert started == []
    assert (facts.scoring, facts.execution, facts.kernel) == (None, None, None)
    assert any("no engine was started" in note for note in facts.notes)


def test_bad_arguments_are_reported_before_the_first_request(folder: Path, undecided: None, tmp_path: Path) -> None:
    def error(pretrained: Path, **arguments: Any) -> str:
        with pytest.raises(UserError) as raised:
            get_model("vllm_nvfp4")(pretrained=str(pretrained), **arguments)
        return str(raised.value)

    assert "lower max_model_len" in error(folder, max_model_len=100_000)
    assert "no-such-method" in error(folder, quantization="no-such-method")
    assert "no_such_argument" in error(folder, no_such_argument=1)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "safetensors" in error(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    assert "no-such-model" in error(tmp_path, load_format="dummy")


@pytest.mark.parametrize(
    ("eager", "mode", "graphs", "expected"),
    [
        (True, 0, "NONE", "eager"),
        (False, 3, "FULL_AND_PIECEWISE", "compiled"),
        (False, 0, "FULL", "compiled"),
        (False, 3, "NONE", "compiled"),
        (False, 0, "NONE", "eager"),
        (False, None, None, None),
    ],
)
def test_execution_is_read_from_the_engine(eager: bool, mode: Any, graphs: Any, expected: Any) -> None:
    from lmeval_ext.models.vllm.execution import execution_of

    compilation = SimpleNamespace(mode=mode, cudagraph_mode=graphs and SimpleNamespace(name=graphs))
    model = SimpleNamespace(enforce_eager=eager)
    assert execution_of(SimpleNamespace(model_config=model, compilation_config=compilation)) == expected


def test_data_parallel_engines_of_each_call_get_the_same_choice() -> None:
    """The harness starts them in Ray with `model_args`, for every call."""
    from lmeval_ext.models.vllm.adapter import VLLMQuantized

    model = VLLMQuantized.__new__(VLLMQuantized)
    vars(model).update(
        _decided=False, _late=None, _running=None, _executions=set(), data_parallel_size=2, model_args={}
    )
    chosen = []
    for execution in ("eager", "eager", "compiled", "eager"):
        model.start_engine(execution)
        chosen.append(model.model_args["enforce_eager"])
    assert chosen == [True, True, False, True]
    assert model._execution() == "eager for log-probabilities, compiled for text"
    vars(model).update(_decided=True, _executions=set(), model_args={"enforce_eager": True})
    model.start_engine("compiled")
    assert (model.model_args["enforce_eager"], model._execution()) == (True, "eager")


def test_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own error says only that inspecting failed; the import that failed is in its log."""
    from lmeval_ext.models.vllm import messages

    error = ValueError("Value error, Model architectures ['Gemma3ForConditionalGeneration'] failed to be inspected.")
    monkeypatch.setattr(messages, "find_spec", lambda name: None)
    assert "install the torchvision built for this torch" in str(messages.explain(error, "/models/gemma"))
    monkeypatch.setattr(messages, "find_spec", lambda name: object())
    assert "torchvision" not in str(messages.explain(error, "/models/gemma"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] broke. [type=value_error, …]",
            "loaded: Model architectures ['X'] broke.; correct",
        ),
        (
            "1 validation error for CacheConfig\nblock_size\n  Input should be 8, 16 or 32 [type=literal]",
            "loaded: block_size: Input should be 8, 16 or 32; correct",
        ),
    ],
)
def test_validation_errors_name_what_is_wrong(text: str, expected: str) -> None:
    from lmeval_ext.models.vllm.messages import explain

    message = str(explain(ValueError(text), "/models/x"))
    assert expected in message
    assert "\n" not in message
