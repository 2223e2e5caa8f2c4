"""Divergence on a GPU; deselected elsewhere. Run by hand: pytest -m gpu tests/gpu/test_divergence_gpu.py

LMEVAL_EXT_GPU_MODELS names a folder with SmolLM2-135M-w768 (bfloat16, Transformers) and its EXL3 form,
SmolLM2-135M-w768-exl3-4.0bpw; WIKITEXT2_DIR the data set's test split. Tests of a missing checkpoint are skipped
and name it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WIDE = "SmolLM2-135M-w768"
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: adapter, checkpoint, arguments
    "vllm": ("vllm_nvfp4", WIDE, {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 4 << 30}),
    "vllm, steps of 512": (
        "vllm_nvfp4",
        WIDE,
        {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 4 << 30, "max_num_batched_tokens": 512},
    ),
    "transformers": ("hf_quant", WIDE, {"dtype": "bfloat16", "batch_size": 2}),
    "exllamav3": ("exllamav3", WIDE, {"max_length": 8192}),
    "exllamav2": ("exllamav2", WIDE, {"max_length": 8192}),
}


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    from lmeval_ext import _hook

    _hook.install()  # a GPU host may have no installed package


def folder(name: str) -> Path:
    path = Path(os.environ.get("LMEVAL_EXT_GPU_MODELS", ".")) / name
    if not (path / "config.json").exists():
        pytest.skip(f"{path} is missing; LMEVAL_EXT_GPU_MODELS must name the folder with the checkpoints")
    return path


def result(engine: str, checkpoint: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Returns the task's figures over three windows, and `divergence` from its metadata."""
    from tests.conftest import evaluate

    adapter, name, settings = ENGINES[engine]
    text = {"text_path": str(Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw")}
    more = {"enforce_eager": True} if adapter == "vllm_nvfp4" else {}
    given = {"pretrained": str(folder(checkpoint or name)), **settings, **more, **arguments}
    found = evaluate(adapter, "wiki2_strided", limit=3, metadata=text, **given)
    gc.collect()
    torch.cuda.empty_cache()
    figures = {key.removesuffix(",none"): value for key, value in found["results"]["wiki2_strided"].items()}
    return figures | {"divergence": found["configs"]["wiki2_strided"]["metadata"].get("divergence")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the store that an engine writes for the unquantized model, once."""
    made: dict[str, str] = {}

    def store(engine: str) -> str:
        if engine not in made:
            made[engine] = str(tmp_path_factory.mktemp("reference") / engine.replace(" ", "-"))
            result(engine, save_reference=made[engine])
        return made[engine]

    return store


# ------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 4096, 5003, 49152])
def test_kernel_equals_float64(dtype: torch.dtype, vocabulary: int) -> None:
    from lmeval_ext.divergence.measure import _fused, token_divergence

    assert _fused() is not None
    torch.manual_seed(0)
    p = torch.randn(97, vocabulary + 3, device="cuda") * 6
    q = (p + torch.randn_like(p) * 0.3).to(dtype)
    targets = torch.randint(vocabulary, (97,), device="cuda")
    found = token_divergence(p, q, targets, vocabulary)
    a, b = (torch.log_softmax(x[:, :vocabulary].double(), 1) for x in (p, q))
    kld = (a.exp() * (a - b)).sum(1)
    np.testing.assert_allclose(found.kld.double().cpu(), kld.cpu(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        found.reference_logprobs.cpu(), a.gather(1, targets[:, None])[:, 0].cpu(), rtol=1e-5, atol=4e-6
    )
    np.testing.assert_allclose(found.confidence.cpu(), a.exp().amax(1).cpu(), rtol=1e-5)
    assert (found.agree == (p[:, :vocabulary].argmax(1) == q[:, :vocabulary].argmax(1))).all()


def test_kernel_handles_infinities_and_nan() -> None:
    from lmeval_ext.divergence.measure import token_divergence

    inf, nan = float("inf"), float("nan")
    p = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [nan, 0.0, 0.0], [1.0, 2.0, 3.0]], device="cuda")
    q = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -inf], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], device="cuda")
    kld = token_divergence(p, q, torch.zeros(4, dtype=torch.int64, device="cuda"), 3).kld.cpu()
    assert kld[0] == pytest.approx(np.log(1.5), rel=1e-6)  # p = (½, ½, 0), q = (⅓, ⅓, ⅓)
    assert kld[1] == inf
    assert torch.isnan(kld[2])
    assert abs(kld[3]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_accumulates_in_float32(dtype: torch.dtype) -> None:
    """16-bit products on the matrix units are as exact as float32 arithmetic; the result is not rounded to 16 bits."""
    from lmeval_ext.divergence.head import OutputHead

    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 768, device="cuda").to(dtype) for n in (64, 3000))
    exact = hidden.double() @ weight.double().t()
    found = OutputHead(weight).logits(hidden)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 1e-3 < exact.to(torch.bfloat16).double().sub(exact).abs().max()


def test_uploads_run_beside_queued_work() -> None:
    """Uploads do not wait for queued work, which waits for them; no memory is reused before that work has finished."""
    from lmeval_ext.divergence.head import OutputHead
    from lmeval_ext.divergence.observer import Upload

    upload, big = Upload(torch.device("cuda", 0)), torch.randn(8192, 8192, device="cuda")
    upload.rows([{"hidden": torch.zeros(9, 9)}], 9)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    sums = []
    for number in range(8):
        for _ in range(5):
            big @ big  # a second of float32 products in all
        parts = [{"hidden": torch.full((n, 1000), float(number))} for n in (700, 300)]
        rows = upload.rows(parts, 1000)["hidden"]
        weight = upload.head(OutputHead(torch.full((500, 1000), float(number)))).weight
        sums.append((rows.sum(), weight.sum()))
        del rows, weight
    done.record()
    assert not done.query()
    assert [(float(a) / 1e6, float(b) / 5e5) for a, b in sums] == [(n, n) for n in range(8)]


# ------------------------------------------------------------------ the engines


def test_vllm_reference_agrees_with_transformers_in_float32(reference: Callable[[str], str]) -> None:
    """An independent implementation: Transformers in float32 against hidden states × output matrix of the store."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmeval_ext.divergence.store import ReferenceStore
    from lmeval_ext.requests import window_key

    path = folder(WIDE)
    store = ReferenceStore.open(reference("vllm"))
    rows = (Path(os.environ["WIKITEXT2_DIR"]) / "wiki.test.raw").read_text().splitlines(keepends=True)
    text = "\n\n".join("" if row == " \n" else row for row in rows)
    ids = AutoTokenizer.from_pretrained(path)(text, verbose=False)["input_ids"][:2048]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    with torch.inference_mode():
        p = torch.log_softmax(model(torch.tensor([ids], device="cuda")).logits[0, :-1].double(), 1)
        hidden = store.read(window_key(ids, 1)).states["hidden"].cuda()
        q = torch.log_softmax(store.head().to("cuda").logits(hidden).double(), 1)
    kld = (p.exp() * (p - q)).sum(1)
    assert 0 < kld.mean() < 2e-3
    assert kld.max() < 0.2


@pytest.mark.parametrize("engine", ENGINES)
def test_divergence_from_an_engines_own_reference_is_rounding(engine: str, reference: Callable[[str], str]) -> None:
    """Only the rounding of logits is left; the perplexity is the same to the last bit with and without a reference."""
    plain, found = result(engine), result(engine, reference=reference(engine))
    assert found["token_perplexity"] == plain["token_perplexity"]
    assert plain["divergence"] is None
    record = found["divergence"]
    assert record["tokens"] == 3 * 2047
    assert -1e-6 < found["kld"] < 2e-3
    assert found["kld"] == pytest.approx(record["rounding"]["kld"], abs=2e-3)
    assert found["top1_agreement"] > 0.95
    assert found["ppl_ratio"] == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "vllm"])
def test_engines_agree_on_the_unquantized_model(engine: str, reference: Callable[[str], str]) -> None:
    found = result(engine, reference=reference("vllm"))
    assert 0 < found["kld"] < 5e-3
    assert found["kld_max"] < 0.5
    assert found["top1_agreement"] > 0.95


def test_exl3_in_its_engine_and_decoded_in_transformers_agree(reference: Callable[[str], str]) -> None:
    """Two implementations of one checkpoint, against one reference."""
    name = f"{WIDE}-exl3-4.0bpw"
    engine = result("exllamav3", name, reference=reference("vllm"))
    decoded = result("transformers", name, dtype="float32", reference=reference("vllm"))
    for metric in ("kld", "kld_median", "kld_p90", "rms_delta_p"):
        assert engine[metric] == pytest.approx(decoded[metric], rel=0.03)
    assert engine["ppl_ratio"] == pytest.approx(decoded["ppl_ratio"], rel=2e-3)
    assert 0.01 < engine["kld"] < 0.2


def test_reference_chunk_changes_only_rounding(reference: Callable[[str], str]) -> None:
    store = reference("vllm")
    usual = result("exllamav3", reference=store)
    small = result("exllamav3", reference=store, reference_chunk=7)
    assert small["kld"] == pytest.approx(usual["kld"], rel=1e-3, abs=1e-6)
    assert small["kld_p99"] == pytest.approx(usual["kld_p99"], rel=1e-3, abs=1e-6)
