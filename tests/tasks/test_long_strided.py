"""`long_strided` and figures by position in the harness, compared with Transformers and numpy."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.corpus import SAMPLE
from lmeval_ext.tasks.protocols import WindowSpec
from tests.conftest import evaluate, load_task, make_llama, make_tokenizer
from tests.tasks.test_perplexity import HarnessModel, Uniform, run_task

LENGTH = 200


def test_windows_are_disjoint_by_default_and_overlap_by_a_given_stride(tiny_tokenizer: Path) -> None:
    task = load_task("long_strided", tokenizer=str(tiny_tokenizer), text_path=str(SAMPLE), eval_len=LENGTH)
    count = len(task.tokens.ids) // LENGTH
    assert [(w.start, w.end, w.first_target) for w in task.windows] == [
        (LENGTH * i, LENGTH * (i + 1), LENGTH * i + 1) for i in range(count)
    ]
    assert task.spec.block_windows == 1
    overlapping = WindowSpec("long_strided", 8, 3)
    assert [(w.start, w.end) for w in overlapping.windows(14)] == [(0, 8), (3, 11), (6, 14)]
    assert overlapping.block_windows == 3


def test_windows_are_32k_unless_the_model_is_shorter(tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match="eval_len=32768 is beyond the model's context"):
        load_task("long_strided", pretrained=str(tiny_tokenizer), text_path=str(SAMPLE))


def test_every_window_begins_with_bos_if_the_vocabulary_adds_it(bos_tokenizer: Path) -> None:
    task = load_task("long_strided", tokenizer=str(bos_tokenizer), text_path=str(SAMPLE), eval_len=LENGTH)
    task.build_all_requests()
    assert {request.ids[0] for request in task.instances} == {0}


def test_perplexity_by_position_needs_no_reference(tiny_tokenizer: Path) -> None:
    _, record = run_task(Uniform(), "sample_strided", tokenizer=str(tiny_tokenizer), eval_len=64, stride=32)
    found = record["by_position"]
    assert found["edges"] == [1, 16, 32, 64]
    assert found["tokens"] == [15 * 20, 16 * 20, 32 * 20]
    assert found["blocks"] == record["standard_error"]["blocks"]
    assert list(found["metrics"]) == ["token_perplexity"]
    assert found["metrics"]["token_perplexity"]["values"] == pytest.approx([4, 4, 4], rel=1e-6)
    assert found["metrics"]["token_perplexity"]["slope"] == pytest.approx(0, abs=1e-9)


def test_positions_count_warmup_tokens(tiny_tokenizer: Path) -> None:
    settings = {"eval_len": 64, "warmup_tokens": 20, "tokenizer": str(tiny_tokenizer), "text_path": str(SAMPLE)}
    _, record = run_task(Uniform(), "long_strided", **settings)
    assert record["by_position"]["edges"] == [21, 32, 64]


def test_harness_models_have_no_figures_by_position(tiny_tokenizer: Path) -> None:
    _, record = run_task(HarnessModel(), "sample_strided", tokenizer=str(tiny_tokenizer), eval_len=64, stride=32)
    assert "by_position" not in record


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama whose tokenizer adds BOS, and the same with noise on its matrices."""
    root = tmp_path_factory.mktemp("long")
    original = make_llama(root / "original", bos_token_id=0)
    make_tokenizer(original, bos=True)
    shutil.copytree(original, root / "noisy")
    tensors = load_file(original / "model.safetensors")
    rng = torch.Generator().manual_seed(3)
    noisy = {
        k: t + 0.05 * t.std() * torch.randn(t.shape, generator=rng) if t.ndim == 2 else t for k, t in tensors.items()
    }
    save_file(noisy, root / "noisy" / "model.safetensors", metadata={"format": "pt"})
    return original, root / "noisy"


def log_softmax(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Float64 [windows, targets, vocabulary] of each row's tokens but the first, by Transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1])).logits.double().numpy()
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.engine
def test_figures_by_position_match_transformers_and_numpy(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    original, noisy = folders
    settings: Any = {"eval_len": LENGTH, "text_path": str(SAMPLE), "dtype": "float32"}
    reference = {"save_reference": str(tmp_path / "ref")}, {"reference": str(tmp_path / "ref")}
    evaluate("hf_quant", "long_strided", metadata=settings, pretrained=str(original), **reference[0])
    result = evaluate("hf_quant", "long_strided", metadata=settings, pretrained=str(noisy), **reference[1])
    found = result["configs"]["long_strided"]["metadata"]["by_position"]

    lines = SAMPLE.read_text(encoding="utf-8").split("\n")[:-1]
    text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    ids = np.array([0, *AutoTokenizer.from_pretrained(original)(text, add_special_tokens=False)["input_ids"]])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).copy()
    rows[:, 0] = 0
    p, q = log_softmax(original, rows), log_softmax(noisy, rows)
    of_p, of_q = (np.take_along_axis(x, rows[:, 1:, None], 2)[..., 0] for x in (p, q))
    by_token = {
        "token_perplexity": -of_q,
        "kld": (np.exp(p) * (p - q)).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).astype(float),
        "ppl_ratio": of_p - of_q,
    }
    position = np.arange(1, LENGTH)
    assert found["edges"] == [1, 16, 32, 64, 128, LENGTH]
    assert found["tokens"] == [len(rows) * n for n in (15, 16, 32, 64, 72)]
    assert found["blocks"] == 32  # of 160 windows
    for metric, values in by_token.items():
        means = [values[:, (position >= a) & (position < b)].mean() for a, b in itertools.pairwise(found["edges"])]
        expected = np.exp(means) if metric in ("token_perplexity", "ppl_ratio") else means
        np.testing.assert_allclose(found["metrics"][metric]["values"], expected, rtol=1e-4)
        line = np.polyfit(np.tile(np.log2(position), len(rows)), values.ravel(), 1)
        assert found["metrics"][metric]["slope"] == pytest.approx(line[0], rel=1e-3, abs=1e-6)
        assert len(found["metrics"][metric]["stderr"]) == 5
        assert None not in found["metrics"][metric]["stderr"]
    assert result["results"]["long_strided"]["token_perplexity,none"] == pytest.approx(np.exp(-of_q.mean()), rel=1e-5)
