"""vLLM on the CPU saves references and measures against them, for any division of prompts into steps."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.arguments import ReferenceArguments
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowScores, window_key
from tests.conftest import make_llama
from tests.divergence.independent import divergences, figures, log_probabilities, windows_of
from tests.divergence.test_end_to_end import TASK, assert_figures, description, perturbed, scored
from tests.models.vllm.fallback import without_worker_scores

pytestmark = pytest.mark.engine

LONG = {"eval_len": 150, "stride": 150, "max_rows": 6}  # steps take 64 tokens: prompts are divided, and on a GPU mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on a CPU needs heads of size 32 or more
    return make_llama(tmp_path_factory.mktemp("models") / "llama-128", hidden_size=128)


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return perturbed(folder, folder.parent / "perturbed")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    """float32, so that agreement is close."""
    yield get_model("vllm_nvfp4")(
        pretrained=str(folder),
        dtype="float32",
        label="vllm",
        max_model_len=200,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        block_size=32,
        kv_cache_memory_bytes=1 << 26,
    )
    gc.collect()


@pytest.fixture(autouse=True)
def arguments(model: Any) -> Iterator[None]:
    yield
    model.reference_arguments = ReferenceArguments()


@pytest.fixture(scope="module")
def reference(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The perturbed model is the reference; vLLM's model is measured."""
    store = tmp_path_factory.mktemp("stores") / "perturbed"
    scored("hf_quant", other, settings=LONG, dtype="float32", save_reference=str(store))
    return store


@pytest.fixture(scope="module")
def by_token(folder: Path, other: Path) -> dict[str, np.ndarray]:
    windows = windows_of(folder, **LONG)
    return divergences(*(log_probabilities(f, windows) for f in (other, folder)), windows)


def mixed(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """All windows at once, as on a GPU: steps of 64 tokens have the end of one window and the start of another."""
    monkeypatch.setattr(model, "_on_cpu", False)
    monkeypatch.setattr(type(model), "describe", _described)


def _described(model: Any) -> Any:
    """`describe` without the memory figures, which do not exist on a CPU."""
    from lmeval_ext.models.record import from_storage

    return from_storage(model.checkpoint(), label="vllm", engine="vllm", engine_version="0", dtype="float32")


@pytest.mark.parametrize("at_once", [False, True])
def test_divergence_equals_transformers(
    at_once: bool,
    model: Any,
    folder: Path,
    reference: Path,
    by_token: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if at_once:
        mixed(monkeypatch, model)
    plain = scored(model, folder, settings=LONG)
    model.reference_arguments = ReferenceArguments(reference=str(reference), reference_chunk=10)
    result = scored(model, folder, settings=LONG)
    assert by_token["kld"].mean() > 1e-2
    assert_figures(result, figures(by_token))
    samples = zip(result["samples"][TASK], plain["samples"][TASK], strict=True)
    assert all(
        a["resps"][0][0][:4] == b["resps"][0][0][:4] for a, b in samples
    )  # scores are the same without a reference
    assert description(result)["role"] == "comparison"


@pytest.mark.parametrize("mode", ["hidden", "logits"])
@pytest.mark.parametrize("at_once", [False, True])
def test_saved_reference_has_transformers_distributions(
    at_once: bool, mode: str, model: Any, folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another engine's figures against the reference are right too."""
    if at_once:
        mixed(monkeypatch, model)
    model.reference_arguments = ReferenceArguments(save_reference=str(tmp_path), reference_mode=mode)
    saved = scored(model, folder, settings=LONG)
    assert description(saved)["role"] == "reference"
    windows, store = windows_of(folder, **LONG), ReferenceStore.open(tmp_path)
    exact = log_probabilities(folder, windows)
    assert len(store) == len(windows) == 6
    if mode == "hidden":
        assert store.head().weight.shape == (384, 128)  # without vLLM's padding
        for window, expected in zip(windows, exact, strict=True):
            hidden = store.read(window_key(window.ids, len(window.context_ids))).states["hidden"]
            stored = torch.log_softmax(store.head().logits(hidden), 1)
            np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=5e-5)
    other_by_token = divergences(exact, log_probabilities(other, windows), windows)
    result = scored("hf_quant", other, settings=LONG, dtype="float32", reference=str(tmp_path))
    assert_figures(result, figures(other_by_token))
    assert description(result)["reference"]["engine"] == "vllm"
    for sample in saved["samples"][TASK]:
        np.testing.assert_allclose(WindowScores(*sample["resps"][0][0]).divergence["kld"], 0, atol=2e-6)  # type: ignore[index]


def test_observer_is_removed_after_scoring(model: Any, folder: Path, reference: Path) -> None:
    model.reference_arguments = ReferenceArguments(reference=str(reference))
    scored(model, folder, settings=LONG)
    (worker,) = model.model.collective_rpc(lambda worker: worker.lmeval_ext_scorer.observer is None)
    assert worker
    assert not model._observing


@pytest.mark.parametrize("part", ["window", "head"])
def test_damaged_reference_ends_the_run_but_not_the_engine(
    part: str, model: Any, folder: Path, reference: Path, tmp_path: Path
) -> None:
    """The damage is found while vLLM computes, whose engine would not survive an exception."""
    copied = Path(shutil.copytree(reference, tmp_path / "store"))
    path = copied / "head.safetensors" if part == "head" else sorted((copied / "windows").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    model.reference_arguments = ReferenceArguments(reference=str(copied))
    with pytest.raises(UserError, match=f"{path.name}: the stored reference is damaged"):
        scored(model, folder, settings=LONG)
    path.write_bytes(content)
    assert description(scored(model, folder, settings=LONG))["role"] == "comparison"


def test_unreachable_engine_is_refused(model: Any, folder: Path, reference: Path) -> None:
    model.reference_arguments = ReferenceArguments(reference=str(reference))
    message = r"which are out of reach in this run \(a reason\); drop reference="
    with without_worker_scores(model, "a reason"), pytest.raises(UserError, match=message):
        scored(model, folder, settings=LONG)
