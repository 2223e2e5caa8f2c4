"""From specs to the plot with the real harness and a real engine, as a user of the guide types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compare.cli import main
from compare.results.reading import read_file
from tests.conftest import make_llama


@pytest.mark.engine
def test_guide_json_with_a_real_engine_gives_perplexity_and_plot(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity against Transformers' own loss, window by window, with compare_q's windows computed by hand."""
    make_llama(tmp_path / "tiny")
    models = [
        {
            "load_fn": "transformers",
            "fwd_fn": "transformers",
            "label": "HF",
            "model_dir": "tiny",
            "args": {"dtype": "float32"},
        },
        {"load_fn": "exllamav3", "fwd_fn": "exllamav3", "label": "EXL3 none", "model_dir": "tiny"},
    ]
    data = {"tokenize_fn": "transformers", "tokenizer_dir": "tiny", "dataset": "sample"}
    data |= {"eval_stride": 64, "eval_len": 128, "max_rows": 3, "warmup_tokens": 28}
    (tmp_path / "models.json").write_text(json.dumps(models))
    (tmp_path / "data.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    flags = ["-p", "-pf", "plot.svg", "-t", "Tiny", "-mask", "HF"]
    assert main(["run", "-d", "data.json", "-m", "models.json", *flags]) == 0
    assert "Tiny" in (tmp_path / "plot.svg").read_text()
    record = read_file(next(tmp_path.glob("results/*/results_*.json")))[0]
    assert record.metric("token_perplexity,none").value == pytest.approx(_by_hand(tmp_path / "tiny"), rel=1e-4)
    assert (record.label, record.quantization.layer_bpw, record.task) == ("HF", 32.0, "sample_strided")
    out = capsys.readouterr().out
    assert "HF: 32.00 bpw (decoder), 32.00 bpw (head), perplexity" in out

    # an engine that is missing or fails: its own error is shown, and the finished result is kept
    assert main(["run", "-d", "data.json", "-m", "models.json"]) == 3
    out = capsys.readouterr().out
    assert "(kept)" in out
    assert "EXL3 none: failed" in out
    assert "lmeval-ext" in out
    assert not list(Path("results/.work").iterdir())


def _by_hand(folder: Path) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmeval_ext.tasks.corpus import SAMPLE, read_corpus

    rows = read_corpus(SAMPLE).rows
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(rows), return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for start in (0, 64, 128):
        window = ids[:, start : start + 128]
        with torch.no_grad():
            logits = model(window).logits[0, -100:][:-1]  # eval_len - warmup positions, the last predicts nothing
        targets = window[0, -100:][1:]
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += len(targets)
    return float(torch.tensor(total / count).exp())
