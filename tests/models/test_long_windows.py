"""Windows longer than what an engine computes at once: scores of a plain forward, and logits of a part at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from torch.utils._python_dispatch import TorchDispatchMode

from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama import batching
from lmeval_ext.models.hf import adapter as hf_adapter
from lmeval_ext.models.hf import scoring as hf_scoring
from lmeval_ext.models.llamacpp.scoring import ContextScorer
from lmeval_ext.models.vllm import scoring as vllm_scoring
from lmeval_ext.requests import WindowRequest, WindowScores, key_of
from tests.architectures.checkpoints import Architecture, make_model
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.models.conftest import demo
from tests.models.exllama.tiny_engine import PADDING, TinyExLlama
from tests.models.test_adapters import transformers_scores, windows

pytestmark = pytest.mark.engine

LENGTH = 4500  # beyond WHOLE_TOKENS of hf_quant, n_batch of llama.cpp, and max_num_batched_tokens below
CONTEXT = 8192
PART = 1 << 20  # bytes of logits at a time in these tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 32 (vLLM's attention on a CPU takes no smaller ones)."""
    path = tmp_path_factory.mktemp("long") / "llama"
    return make_llama(path, hidden_size=128, max_position_embeddings=CONTEXT, initializer_range=0.08)


@pytest.fixture(scope="module")
def window() -> WindowRequest:
    return windows(1, LENGTH, 3)[0]


@pytest.fixture(scope="module")
def expected(folder: Path, window: WindowRequest) -> np.ndarray:
    return transformers_scores(folder, [window])[0][0]


class LogitRows(TorchDispatchMode):
    """The most rows of a tensor that is as wide as the vocabulary, among all that PyTorch computes meanwhile."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:
            return result  # a view of the output matrix
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.ndim
                and tensor.shape[-1] in (VOCABULARY, VOCABULARY + PADDING)
            ):
                self.most = max(self.most, tensor.numel() // tensor.shape[-1])
        return result


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_scoring, "_PART_BYTES", PART)
    monkeypatch.setattr(batching, "CPU_LOGIT_BYTES", PART)
    monkeypatch.setattr(vllm_scoring, "_LOGITS_BYTES_ON_CPU", PART)


def hf_quant(folder: Path, **arguments: Any) -> Any:
    return get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu", **arguments)


def exllama(folder: Path, **arguments: Any) -> Any:
    return TinyExLlama(str(folder), **arguments)


@pytest.mark.parametrize(
    ("make", "most"), [(hf_quant, PART // (4 * VOCABULARY)), (exllama, PART // (2 * (VOCABULARY + PADDING)))]
)
@pytest.mark.usefixtures("small_parts")
def test_logits_of_a_part_alone_exist_and_scores_are_those_of_a_plain_forward(
    make: Callable[..., Any], most: int, folder: Path, window: WindowRequest, expected: np.ndarray
) -> None:
    model = make(folder)
    with LogitRows() as rows:
        (scores,) = model._loglikelihood_tokens([window])
    np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=1e-4)
    assert 0 < rows.most <= most


def test_llamacpp_reads_logits_batch_by_batch(
    folder: Path, window: WindowRequest, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    demo("to_gguf.py", folder, file, "--type", "F32")
    read: list[int] = []
    original = ContextScorer._read_logits
    monkeypatch.setattr(
        ContextScorer, "_read_logits", lambda self, rows, *a: (read.append(rows), original(self, rows, *a))[1]
    )
    model = get_model("llamacpp")(pretrained=str(file), max_length=LENGTH, type_k="f32", type_v="f32", n_threads=1)
    (scores,) = model._loglikelihood_tokens([window])
    np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=1e-4)
    assert sum(read) == LENGTH - 3
    assert max(read) <= 512  # llama-cpp-python's n_batch


@pytest.mark.usefixtures("small_parts")
def test_vllm_prefills_in_steps_and_computes_logits_in_parts(
    folder: Path, window: WindowRequest, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original = vllm_scoring.target_logprobs
    monkeypatch.setattr(
        vllm_scoring, "target_logprobs", lambda logits, *a: (rows.append(logits.shape[0]), original(logits, *a))[1]
    )
    model = get_model("vllm_nvfp4")(
        pretrained=str(folder), dtype="float32", max_model_len=CONTEXT, max_num_batched_tokens=1024,
        kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    (scores,) = model._loglikelihood_tokens([window])
    np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=1e-4)
    assert sum(rows) == LENGTH - 3
    assert max(rows) <= PART // (4 * VOCABULARY)


@pytest.fixture
def parts_from_64_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_adapter, "WHOLE_TOKENS", 64)
    monkeypatch.setattr(hf_scoring, "_PART_BYTES", 4 * VOCABULARY * 20)


@pytest.mark.usefixtures("parts_from_64_on")
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("CohereConfig", {"logit_scale": 0.0625}),
        ("NanoChatConfig", {"final_logit_softcapping": 15.0}),
        ("GraniteConfig", {"logits_scaling": 6.0}),
    ],
)
def test_parts_apply_scale_and_cap_of_the_logits(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(Architecture(config, fields)).save_pretrained(folder)
    make_tokenizer(folder)
    several = windows(3, 150, 20)
    scores = hf_quant(folder, batch_size=2)._loglikelihood_tokens(several)
    np.testing.assert_allclose([s.logprobs for s in scores], transformers_scores(folder, several)[0], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("parts_from_64_on")
def test_reference_of_long_windows_holds_hidden_states_and_fits_its_own_model(folder: Path, tmp_path: Path) -> None:
    """Parts, each with its place in the window, give the store and the divergence of one forward."""
    (request,) = windows(1, 150, 20)
    with LogitRows() as rows:
        hf_quant(folder, save_reference=str(tmp_path / "parts"))._loglikelihood_tokens([request])
        (scores,) = hf_quant(folder, reference=str(tmp_path / "parts"))._loglikelihood_tokens([request])
    assert rows.most <= 20
    stored = ReferenceStore.open(tmp_path / "parts").read(key_of(request))
    assert stored.states["hidden"].shape == (130, 128)
    np.testing.assert_allclose(stored.states["hidden"], plain_states(folder, request), rtol=0, atol=1e-5)
    assert isinstance(scores, WindowScores)
    assert scores.divergence is not None
    np.testing.assert_allclose(np.asarray(scores.divergence["kld"]), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(scores.divergence["model_logprobs"]), scores.logprobs, atol=1e-5)


def plain_states(folder: Path, request: WindowRequest) -> np.ndarray:
    """The final hidden states that predict the request's targets, by Transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(torch.tensor([request.ids[:-1]])).last_hidden_state[0]
    return np.asarray(states[-len(request.target_ids) :])


@pytest.mark.usefixtures("parts_from_64_on")
def test_logits_that_parts_cannot_give_are_an_error(folder: Path) -> None:
    model = hf_quant(folder)
    model._settings = None  # as of a model whose logits are another function of the products
    with pytest.raises(UserError, match="set eval_len to 64 at most"):
        model._loglikelihood_tokens(windows(1, 150, 20))
