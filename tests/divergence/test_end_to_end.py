"""save_reference= and reference= in the harness, compared with Transformers and numpy; resuming, damage, refusals."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.models.observed import Observed
from lmeval_ext.requests import WindowRequest, WindowScores, window_key
from tests.conftest import VOCABULARY, evaluate, make_llama, make_tokenizer, run
from tests.divergence.independent import divergences, figures, log_probabilities, windows_of
from tests.divergence.stores import same
from tests.models.exllama.tiny_engine import TinyExLlama
from tests.models.test_adapters import requests_of

pytestmark = pytest.mark.engine

TASK = "sample_strided"
SMALL = {"eval_len": 64, "stride": 64, "max_rows": 12}


def scored(model: Any, folder: Path, task: str = TASK, settings: Any = SMALL, **arguments: Any) -> Any:
    """A result of the harness. model: a registered name, or an adapter that has its arguments already."""
    if isinstance(model, str):
        return evaluate(model, task, metadata=settings, pretrained=str(folder), **arguments)
    return evaluate(model, task, metadata={"pretrained": str(folder), **settings})


def metrics_of(result: Any) -> dict[str, Any]:
    """Metrics of the result, without the filter in their names."""
    return {name.removesuffix(",none"): value for name, value in result["results"][TASK].items()}


def description(result: Any) -> dict[str, Any]:
    return dict(result["configs"][TASK]["metadata"]["divergence"])


def token_values(result: Any, name: str) -> np.ndarray:
    """Values of all tokens in the order of the windows, from the samples."""
    return np.concatenate([WindowScores(*s["resps"][0][0]).divergence[name] for s in _samples(result)])  # type: ignore[index]


def _samples(result: Any) -> list[Any]:
    return sorted(result["samples"][TASK], key=lambda s: s["doc"]["window"])


def assert_figures(result: Any, expected: dict[str, float], rel: float = 1e-4, **others: float) -> None:
    metrics = metrics_of(result)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=others.get(name, rel), abs=2e-6), name


def perturbed(source: Path, target: Path, size: float = 0.05) -> Path:
    """Another model with the same tokenizer: noise on every matrix."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    rng = torch.Generator().manual_seed(1)
    for name, t in tensors.items():
        if t.ndim == 2:
            tensors[name] = t + size * t.std() * torch.randn(t.shape, generator=rng)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tiny_llama, tmp_path_factory.mktemp("models") / "perturbed")


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny_llama in float32."""
    folder = tmp_path_factory.mktemp("stores") / "float32"
    scored("hf_quant", tiny_llama, dtype="float32", label="full", save_reference=str(folder))
    return folder


def keys(folder: Path) -> list[str]:
    return [window_key(w.ids, len(w.context_ids)) for w in windows_of(folder, **SMALL)]


@pytest.fixture
def copied(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference that a test may damage."""
    return Path(shutil.copytree(reference, tmp_path / "store"))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, other_llama: Path) -> dict[str, np.ndarray]:
    """Divergence of other_llama from tiny_llama, both in float32, per token."""
    windows = windows_of(tiny_llama, **SMALL)
    return divergences(*(log_probabilities(f, windows) for f in (tiny_llama, other_llama)), windows)


# ---------------------------------------------------------------------- hf_quant


def test_divergence_of_bfloat16_from_float32(tiny_llama: Path, reference: Path) -> None:
    windows = windows_of(tiny_llama, **SMALL)
    p, q = (log_probabilities(tiny_llama, windows, dtype) for dtype in ("float32", "bfloat16"))
    by_token = divergences(p, q, windows)
    result = scored("hf_quant", tiny_llama, dtype="bfloat16", reference=str(reference))
    assert len(by_token["kld"]) == 12 * 63
    assert 1e-5 < by_token["kld"].mean() < 1e-2
    assert_figures(result, figures(by_token), rel=1e-3)
    np.testing.assert_allclose(token_values(result, "kld"), by_token["kld"], rtol=1e-3, atol=1e-6)
    assert (token_values(result, "agree") == by_token["agree"]).all()
    np.testing.assert_allclose(token_values(result, "reference_logprobs"), by_token["reference_logprobs"], rtol=1e-5)
    np.testing.assert_allclose(token_values(result, "confidence"), by_token["confidence"], rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"reference_chunk": 1}, {"reference_chunk": 10, "batch_size": 5}])
def test_divergence_of_another_model_for_any_chunk(
    other_llama: Path, reference: Path, expected: dict[str, np.ndarray], arguments: dict[str, Any]
) -> None:
    result = scored("hf_quant", other_llama, dtype="float32", reference=str(reference), **arguments)
    assert_figures(result, figures(expected))
    metrics = metrics_of(result)
    for name in ("kld", "kld_median", "kld_p90", "kld_p99", "top1_agreement", "rms_delta_p", "ppl_ratio"):
        assert 0 < metrics[f"{name}_stderr"] < 1, name
    assert metrics["kld_p999_stderr"] == metrics["kld_max_stderr"] == "N/A"
    divergence = description(result)
    assert divergence["role"] == "comparison"
    assert divergence["tokens"] == 12 * 63
    assert divergence["vocabulary"] == VOCABULARY
    assert divergence["reference"]["label"] == "full"
    assert (divergence["reference"]["engine"], divergence["reference"]["dtype"]) == ("transformers", "float32")
    assert abs(divergence["rounding"]["kld"]) < 1e-6  # rounding of a float32 engine


def test_rounding_of_the_run_that_saves_is_reported(tiny_llama: Path, tmp_path: Path) -> None:
    """It compares bfloat16 logits with bfloat16 hidden states × matrix in float32; later runs report the same."""
    from transformers import AutoModelForCausalLM

    windows = windows_of(tiny_llama, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    exact, rounded = [], []
    for w in windows:
        with torch.no_grad():
            out = model(torch.tensor([w.ids[:-1]]), output_hidden_states=True, use_cache=False)
        wide = out.hidden_states[-1][0].double() @ model.lm_head.weight.detach().double().T
        exact.append(torch.log_softmax(wide, 1).numpy())
        rounded.append(torch.log_softmax(out.logits[0].double(), 1).numpy())
    by_token = divergences(exact, rounded, windows)
    saved = scored("hf_quant", tiny_llama, dtype="bfloat16", save_reference=str(tmp_path / "store"))
    assert by_token["kld"].mean() > 1e-6
    assert_figures(saved, figures(by_token), rel=1e-2)
    assert description(saved)["role"] == "reference"
    again = scored("hf_quant", tiny_llama, dtype="bfloat16", reference=str(tmp_path / "store"))
    assert token_values(again, "kld").tolist() == token_values(saved, "kld").tolist()
    for result in (saved, again):
        rounding = description(result)["rounding"]
        assert rounding["kld"] == pytest.approx(by_token["kld"].mean(), rel=1e-2)
        assert rounding["kld_max"] == pytest.approx(by_token["kld"].max(), rel=1e-2)
        assert (rounding["engine"], rounding["dtype"]) == ("transformers", "bfloat16")


def test_windows_of_a_batch_are_saved_separately(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    scored("hf_quant", tiny_llama, dtype="float32", batch_size=5, save_reference=str(store))
    for key in keys(tiny_llama):
        a, b = (ReferenceStore.open(folder).read(key).states["hidden"] for folder in (store, reference))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_divergence_from_coded_logits(tmp_path: Path) -> None:
    """Mode "logits" with most tokens not stored exactly. Coding shifts the figure by less than a hundredth."""
    full = make_llama(tmp_path / "full", vocabulary=1500)
    other, windows = perturbed(full, tmp_path / "other"), windows_of(full, **SMALL)
    store = tmp_path / "store"
    saved = scored("hf_quant", full, dtype="float32", save_reference=str(store), reference_mode="logits")
    assert abs(metrics_of(saved)["kld"]) < 1e-7  # the effect of coding that float32 resolves
    assert not (store / "head.safetensors").exists()
    result = scored("hf_quant", other, dtype="float32", reference=str(store))
    by_token = divergences(*(log_probabilities(f, windows) for f in (full, other)), windows)
    metrics = metrics_of(result)
    assert metrics["kld"] == pytest.approx(by_token["kld"].mean(), rel=0.01)
    assert metrics["top1_agreement"] == by_token["agree"].mean()
    assert description(result)["reference"]["mode"] == "logits"


@pytest.mark.parametrize("more", [0, 64, -20])
def test_vocabularies_that_differ_by_padding_are_compared(
    tiny_llama: Path, reference: Path, tmp_path: Path, more: int
) -> None:
    """Both distributions are renormalized over the tokens in common."""
    other = make_llama(tmp_path / "other", vocabulary=VOCABULARY + more)
    make_tokenizer_of(tiny_llama, other)
    windows, common = windows_of(tiny_llama, **SMALL), VOCABULARY + min(more, 0)
    if max(max(w.ids) for w in windows) >= common:
        with pytest.raises(UserError, match="vocabulary of 364"):
            scored("hf_quant", other, dtype="float32", reference=str(reference))
        return
    result = scored("hf_quant", other, dtype="float32", reference=str(reference))
    p, q = (log_probabilities(f, windows, vocabulary=common) for f in (tiny_llama, other))
    by_token = divergences(p, q, windows)
    assert description(result)["vocabulary"] == common
    np.testing.assert_allclose(token_values(result, "kld"), by_token["kld"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(token_values(result, "model_logprobs"), by_token["logprobs"], rtol=1e-4, atol=1e-5)
    expected = figures(by_token)
    for name in ("ppl_ratio", "mean_delta_p", "rms_delta_p"):
        assert metrics_of(result)[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def make_tokenizer_of(source: Path, target: Path) -> None:
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_the_same_with_and_without_reference(
    tiny_llama: Path, reference: Path, tmp_path: Path, dtype: str
) -> None:
    """To the last bit, samples included."""
    plain = scored("hf_quant", tiny_llama, dtype=dtype)
    for arguments in ({"reference": str(reference)}, {"save_reference": str(tmp_path / "store")}):
        result = scored("hf_quant", tiny_llama, dtype=dtype, **arguments)
        for name, value in metrics_of(plain).items():
            assert metrics_of(result)[name] == value, name
        for a, b in zip(_samples(result), _samples(plain), strict=True):
            assert a["resps"][0][0][:4] == b["resps"][0][0][:4]
        metadata, plain_metadata = (r["configs"][TASK]["metadata"] for r in (result, plain))
        assert all(metadata[k] == v for k, v in plain_metadata.items() if k not in ("standard_error", "by_position"))
        by_position, plain_by_position = (m["by_position"]["metrics"] for m in (metadata, plain_metadata))
        assert all(by_position[name] == figures for name, figures in plain_by_position.items())
    assert "divergence" not in plain["configs"][TASK]["metadata"]
    assert not any(name.startswith(("kld", "ppl_ratio")) for name in metrics_of(plain))


def test_one_store_serves_several_tasks(tiny_llama: Path, other_llama: Path, tmp_path: Path) -> None:
    """The windows of one task overlap; windows of the two tasks are different windows."""
    store, both = tmp_path / "store", ({"eval_len": 64, "stride": 16, "max_rows": 7}, SMALL)
    for settings in both:
        scored("hf_quant", tiny_llama, settings=settings, dtype="float32", save_reference=str(store))
    assert len(ReferenceStore.open(store)) == 7 + 12 - len(
        {window_key(w.ids, 1) for w in windows_of(tiny_llama, **both[0])}
        & {window_key(w.ids, 1) for w in windows_of(tiny_llama, **both[1])}
    )
    for settings in both:
        result = scored("hf_quant", other_llama, settings=settings, dtype="float32", reference=str(store))
        windows = windows_of(tiny_llama, **settings)
        by_token = divergences(*(log_probabilities(f, windows) for f in (tiny_llama, other_llama)), windows)
        assert_figures(result, figures(by_token))


# ---------------------------------------------------------------------- other engines


@pytest.mark.parametrize("memory", [None, 200])
def test_exllama_saves_and_compares(
    memory: int | None,
    tiny_llama: Path,
    other_llama: Path,
    tmp_path: Path,
    expected: dict[str, np.ndarray],
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapters' shared class halves its batches while it saves and while it measures.

    A memory of 200 tokens holds 3 windows of 64, but not 12.
    """
    store = str(tmp_path / "store")
    monkeypatch.setattr(TinyExLlama, "windows_at_once", 12)
    saved = scored(TinyExLlama(str(tiny_llama), memory=memory, save_reference=store), tiny_llama)
    np.testing.assert_allclose(token_values(saved, "kld"), 0, atol=1e-6)
    model = TinyExLlama(str(other_llama), memory=memory, reference=store)
    assert_figures(scored(model, other_llama), figures(expected))
    assert ("out of GPU memory with 12 × 64 tokens" in caplog.text) == (memory is not None)
    assert_figures(scored("hf_quant", other_llama, dtype="float32", reference=store), figures(expected))


def test_exllama_out_of_memory_during_logits_saves_every_state_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that was observed before is observed twice; the store has its states once, in their places."""
    monkeypatch.setattr(TinyExLlama, "windows_at_once", 12)
    model = TinyExLlama(str(tiny_llama), save_reference=str(tmp_path / "store"))
    model.batching.logit_bytes = 2 * model.engine.columns * 100  # 100 positions at a time
    logits, calls = model.engine.logits, list[int]()

    def short(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        if len(calls) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        return logits(hidden)

    monkeypatch.setattr(model.engine, "logits", short)
    scored(model, tiny_llama)
    plain = TinyExLlama(str(tiny_llama), save_reference=str(tmp_path / "plain"))
    scored(plain, tiny_llama)
    a, b = (ReferenceStore.open(tmp_path / name) for name in ("store", "plain"))
    assert len(a) == len(b) == 12
    for key in keys(tiny_llama):
        np.testing.assert_allclose(a.read(key).states["hidden"], b.read(key).states["hidden"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ggufs(tiny_llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tests.models.conftest import demo

    folder = tmp_path_factory.mktemp("gguf")
    files = [folder / "tiny-F32.gguf", folder / "other-F32.gguf"]
    for source, file in zip((tiny_llama, other_llama), files, strict=True):
        demo("to_gguf.py", source, file, "--type", "F32")
    return files


IN_FLOAT32 = {"type_k": "f32", "type_v": "f32"}


def test_llamacpp_saves_and_compares(
    ggufs: list[Path], other_llama: Path, reference: Path, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    """References are its own logits, and hidden states of another engine; batches are smaller than a window."""
    store = str(tmp_path / "store")
    saved = scored("llamacpp", ggufs[0], save_reference=store, **IN_FLOAT32)
    np.testing.assert_allclose(token_values(saved, "kld"), 0, atol=1e-6)  # 384 logits are stored exactly
    assert description(saved)["reference"]["mode"] == "logits"
    for folder in (store, str(reference)):
        result = scored("llamacpp", ggufs[1], reference=folder, n_batch=40, n_ubatch=40, **IN_FLOAT32)
        assert_figures(result, figures(expected), rel=2e-3)
    result = scored("hf_quant", other_llama, dtype="float32", reference=store)
    assert_figures(result, figures(expected), rel=2e-3)


def test_llamacpp_refuses_mode_hidden(ggufs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference_mode=hidden: this engine gives no hidden states"):
        scored("llamacpp", ggufs[0], save_reference=str(tmp_path / "store"), reference_mode="hidden")
    assert not (tmp_path / "store").exists()


# ---------------------------------------------------------------------- resuming and damage


class Counting:
    """Counts the windows that an adapter scores; raises after `limit` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> None:
        from lmeval_ext.models.hf.adapter import HFQuantized

        self.windows, self.limit = list[str](), limit
        original = HFQuantized.score_windows

        def counted(model: Any, windows: Sequence[WindowRequest]) -> list[WindowScores]:
            if self.limit is not None and len(self.windows) >= self.limit:
                raise KeyboardInterrupt
            self.windows += [w.arguments[0] for w in windows]
            return original(model, windows)

        monkeypatch.setattr(HFQuantized, "score_windows", counted)


def test_interrupted_run_is_resumed(
    tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A window that was scored is written at once, and never scored again."""
    counting, store = Counting(monkeypatch, limit=6), tmp_path / "store"
    arguments: dict[str, Any] = {"dtype": "float32", "label": "full", "save_reference": str(store)}
    with pytest.raises(KeyboardInterrupt):
        scored("hf_quant", tiny_llama, **arguments)
    assert len(ReferenceStore.open(store)) == 6
    counting.limit = None
    result = scored("hf_quant", tiny_llama, **arguments)
    assert len(counting.windows) == len(set(counting.windows)) == 12
    assert "6 of 12 windows are there already" in caplog.text
    assert sorted(p.name for p in store.rglob("*")) == sorted(p.name for p in reference.rglob("*"))
    for key in keys(tiny_llama):
        assert same(ReferenceStore.open(store).read(key), ReferenceStore.open(reference).read(key))
    once = scored("hf_quant", tiny_llama, **arguments)  # complete: nothing is scored
    assert len(counting.windows) == 12
    fresh = scored("hf_quant", tiny_llama, **(arguments | {"save_reference": str(tmp_path / "fresh")}))
    for other in (once, fresh):
        assert metrics_of(other) == metrics_of(result)
        assert [s["resps"] for s in _samples(other)] == [s["resps"] for s in _samples(result)]


def test_damaged_window_is_refused_by_reference_and_written_again_by_save(
    tiny_llama: Path, reference: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    counting = Counting(monkeypatch)
    key = keys(tiny_llama)[3]
    path = ReferenceStore.open(copied).path(key)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=path.name):
        scored("hf_quant", tiny_llama, dtype="float32", reference=str(copied))
    counting.windows.clear()
    scored("hf_quant", tiny_llama, dtype="float32", save_reference=str(copied))
    assert len(counting.windows) == 1
    assert f"written again: {path}" in caplog.text
    assert same(ReferenceStore.open(copied).read(key), ReferenceStore.open(reference).read(key))
    scored("hf_quant", tiny_llama, dtype="float32", reference=str(copied))


def _damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])


def test_damaged_manifest_is_refused_by_both_arguments(tiny_llama: Path, copied: Path) -> None:
    _damage(copied / "reference.json")
    for argument in ("reference", "save_reference"):
        with pytest.raises(UserError, match=r"reference\.json.*delete the whole folder"):
            scored("hf_quant", tiny_llama, dtype="float32", **{argument: str(copied)})


@pytest.mark.parametrize("harm", [_damage, Path.unlink], ids=["damaged", "missing"])
def test_damaged_or_missing_head_is_written_again(
    tiny_llama: Path, copied: Path, harm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message says, and without scoring a window."""
    counting, path = Counting(monkeypatch), copied / "head.safetensors"
    weight = ReferenceStore.open(copied).head().weight.clone()  # else it is the memory of the mapped file
    harm(path)
    with pytest.raises(UserError, match=r"head\.safetensors.*run the same task with save_reference= again"):
        scored("hf_quant", tiny_llama, dtype="float32", reference=str(copied))
    counting.windows.clear()
    scored("hf_quant", tiny_llama, dtype="float32", save_reference=str(copied), label="full")
    assert torch.equal(ReferenceStore.open(copied).head().weight, weight)
    assert counting.windows == []
    scored("hf_quant", tiny_llama, dtype="float32", reference=str(copied))


def test_missing_head_is_refused(tiny_llama: Path, copied: Path) -> None:
    (copied / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors: .*it is missing"):
        scored("hf_quant", tiny_llama, dtype="float32", reference=str(copied))


# ---------------------------------------------------------------------- refusals


def test_saving_another_model_into_the_folder_is_refused(other_llama: Path, tiny_llama: Path, copied: Path) -> None:
    for folder, dtype in ((other_llama, "float32"), (tiny_llama, "bfloat16")):
        with pytest.raises(UserError, match=r"holds the reference of another model or setting, full .*, not of mine"):
            scored("hf_quant", folder, dtype=dtype, label="mine", save_reference=str(copied))


@pytest.mark.parametrize("change", ["config", "argument"])
def test_same_weights_with_another_config_or_argument_are_another_model(
    tiny_llama: Path, copied: Path, tmp_path: Path, change: str
) -> None:
    folder, more = tiny_llama, {"attn_implementation": "eager"}
    if change == "config":
        folder, more = Path(shutil.copytree(tiny_llama, tmp_path / "m")), {}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0, "rope_parameters": None}))
    with pytest.raises(UserError, match="holds the reference of another model or setting"):
        scored("hf_quant", folder, dtype="float32", label="full", save_reference=str(copied), **more)


def test_checkpoint_of_another_tokenizer_is_refused_despite_tokenizer_argument(
    tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    """The windows' ids exist in any model with as many tokens, but may stand for other tokens."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = "e", "t"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="another tokenizer than this model"):
        scored("hf_quant", folder, dtype="float32", tokenizer=str(tiny_llama), reference=str(reference))


def test_windows_that_the_store_lacks_are_refused(tiny_llama: Path, reference: Path) -> None:
    settings = {**SMALL, "eval_len": 96, "max_rows": 10}
    with pytest.raises(UserError, match=r"holds 12 windows, but not 10 of the 10 of this task \(first: tokens 0 to 96"):
        scored("hf_quant", tiny_llama, settings=settings, dtype="float32", reference=str(reference))
    with pytest.raises(UserError, match="but not 2 of the 14"):
        scored("hf_quant", tiny_llama, settings={**SMALL, "max_rows": 14}, dtype="float32", reference=str(reference))
    few = scored("hf_quant", tiny_llama, settings={**SMALL, "max_rows": 5}, dtype="float32", reference=str(reference))
    assert metrics_of(few)["kld"] == pytest.approx(0, abs=1e-6)  # a subset is accepted


def test_another_tokenizer_is_refused(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other")
    make_tokenizer(other, vocabulary=VOCABULARY - 80)
    with pytest.raises(UserError, match=r"the reference full \(transformers .*, float32\) has another tokenizer"):
        scored("hf_quant", other, dtype="float32", reference=str(reference))


def test_vocabulary_beyond_padding_is_refused(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", vocabulary=VOCABULARY + 1024)
    make_tokenizer_of(tiny_llama, other)
    with pytest.raises(UserError, match="vocabulary of 384 tokens, this model 1408; they differ by more than padding"):
        scored("hf_quant", other, dtype="float32", reference=str(reference))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "a", "save_reference": "b"}, "belong to two runs"),
        ({"reference": "/nowhere/store"}, r"reference=/nowhere/store: no reference\.json there"),
        ({"reference": " "}, "expected a folder"),
        ({"save_reference": 5}, "save_reference=5: expected a folder"),
        (
            {"save_reference": "a", "reference_mode": "states"},
            "reference_mode='states': expected one of hidden, logits",
        ),
        ({"reference": "a", "reference_mode": "logits"}, "since a stored reference has its mode"),
        ({"reference_chunk": 16}, "reference_chunk= goes with"),
        ({"reference": "a", "reference_chunk": 0}, "reference_chunk=0: expected a number of tokens, 1 or more"),
        ({"reference": "a", "reference_chunk": "many"}, "reference_chunk='many'"),
        ({"reference": "a", "reference_chunk": True}, "reference_chunk=True"),
    ],
)
@pytest.mark.parametrize("name", ["hf_quant", "tiny"])
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], message: str, tiny_llama: Path) -> None:
    def score() -> None:
        model = TinyExLlama(str(tiny_llama), **arguments) if name == "tiny" else name
        scored(model, tiny_llama, **({} if name == "tiny" else arguments))

    with pytest.raises(UserError, match=message) as caught:
        score()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["hidden", "logits"])
def test_model_of_nan_is_refused_as_reference(tiny_llama: Path, tmp_path: Path, mode: str) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="63 of 63 distributions are not finite"):
        scored("hf_quant", folder, dtype="float32", save_reference=str(tmp_path / "store"), reference_mode=mode)
    assert len(ReferenceStore.open(tmp_path / "store")) == 0


def test_figures_of_a_model_of_nan_are_none(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = scored("hf_quant", folder, dtype="float32", reference=str(reference))
    for name in ("kld", "kld_median", "kld_max", "top1_agreement", "mean_delta_p", "ppl_ratio", "token_perplexity"):
        assert metrics_of(result)[name] is None
    assert description(result)["quantiles"] is None


def test_head_with_an_unknown_step_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmeval_ext.models.hf.adapter import HFQuantized

    right = HFQuantized.output_head
    # the logits' cap of RecurrentGemma and xLSTM, which changes them by less than 16 bits would
    monkeypatch.setattr(HFQuantized, "output_head", lambda self: dataclasses.replace(right(self), softcap=30.0))
    with pytest.raises(UserError, match="its head does something that is not known here; use reference_mode=logits"):
        scored("hf_quant", tiny_llama, dtype="float32", save_reference=str(tmp_path / "store"))
    assert len(ReferenceStore.open(tmp_path / "store")) == 0


# ---------------------------------------------------------------------- other requests, messages, the command


def test_other_requests_ignore_the_reference(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    plain = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32")
    pairs = requests_of("loglikelihood", ("Iceland is", " an island"), ("", "The capital"), ("Iceland is", " a"))
    texts = requests_of("loglikelihood_rolling", ("Iceland is an island country. " * 9,))
    prompts = requests_of("generate_until", ("Iceland", {"until": ["\n"], "max_gen_toks": 8}))
    for arguments in ({"reference": str(reference)}, {"save_reference": str(tmp_path / "store")}):
        model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", **arguments)
        assert model.loglikelihood(pairs) == plain.loglikelihood(pairs)
        assert model.loglikelihood_rolling(texts) == plain.loglikelihood_rolling(texts)
        assert model.generate_until(prompts) == plain.generate_until(prompts)
    assert not (tmp_path / "store").exists()


def test_observer_is_removed_after_a_failure(
    tiny_llama: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", reference=str(reference))
    with monkeypatch.context() as patch:
        patch.setattr(model, "score_windows", lambda windows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scored(model, tiny_llama)
    assert model.observer is None
    assert isinstance(model, Observed)
    assert metrics_of(scored(model, tiny_llama))["kld"] == pytest.approx(0, abs=1e-6)


def test_size_of_the_store_is_logged(tiny_llama: Path, tmp_path: Path, caplog: Any) -> None:
    """12 windows of 63 tokens; their logits in float32 are 12 · 63 · 384 · 4 bytes."""
    with caplog.at_level(logging.WARNING):
        scored("hf_quant", tiny_llama, dtype="float32", save_reference=str(tmp_path / "store"))
    size = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*.safetensors"))
    logits = 12 * 63 * 384 * 4
    assert f"12 windows, 756 scored tokens, {size / 1e6:.1f} MB in all" in caplog.text
    assert f"are {logits / 1e6:.1f} MB, {logits / size:.1f} times as much" in caplog.text


def test_command_writes_results_and_samples(
    tiny_llama: Path, other_llama: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """`lm_eval` as a user types it; the samples are JSON, with a divergence per token."""
    store, common = tmp_path / "store", ("--tasks", TASK, "--metadata", json.dumps(SMALL), "--log_samples")
    for folder, argument, name in ((tiny_llama, "save_reference", "full"), (other_llama, "reference", "other")):
        done = run(
            *("lm_eval", "run", "--model", "hf_quant", *common, "--output_path", tmp_path / name),
            *("--model_args", f"pretrained={folder},dtype=float32,label={name},{argument}={store}"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "kld_p99" in done.stdout
    (file,) = (tmp_path / "other").rglob("results_*.json")
    content = json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    for name, value in figures(expected).items():
        assert content["results"][TASK][f"{name},none"] == pytest.approx(value, rel=1e-4, abs=2e-6), name
    assert content["configs"][TASK]["metadata"]["divergence"]["reference"]["label"] == "full"
    (file,) = (tmp_path / "other").rglob("samples_*.jsonl")
    samples = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert len(samples) == 12
    samples.sort(key=lambda s: s["doc"]["window"])
    # The harness writes a model's response as text: lists as JSON, and a dictionary as Python prints it
    kld = np.concatenate([ast.literal_eval(s["resps"][0][0][4])["kld"] for s in samples])
    np.testing.assert_allclose(kld, expected["kld"], rtol=1e-4, atol=2e-6)
    assert samples[0]["kld_median"] == "63 tokens"
    missing = run(
        *("lm_eval", "run", "--model", "hf_quant", *common, "--output_path", tmp_path / "none"),
        *("--model_args", f"pretrained={tiny_llama},dtype=float32,reference={tmp_path / 'nowhere'}"),
    )
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines()[-1].startswith("lmeval-ext: error: reference=")
