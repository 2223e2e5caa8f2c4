"""demo/to_gguf.py against transformers (logits, tokens) and gguf's own reader (tensors, metadata)."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import outputs
import pytest
import to_gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tiny import SPECIAL, TEXT, VOCABULARY

Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    def call(source: Path, kind: str = "F32") -> Path:
        target = tmp_path / f"{source.name}-{kind}.gguf"
        monkeypatch.setattr(sys, "argv", ["to_gguf.py", str(source), str(target), "--type", kind])
        to_gguf.main()
        return target

    return call


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def matrices(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def engine(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the demo's GGUF scripts need llama-cpp-python")
    float32 = llama_cpp.GGML_TYPE_F32  # llama.cpp's default for keys and values is float16
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, type_k=float32, type_v=float32, verbose=False
    )


def llama_cpp_logits(path: Path, ids: list[int]) -> np.ndarray:
    model = engine(path)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.engine
@pytest.mark.parametrize("checkpoint", ["tiny", "tiny_tied"])
def test_llama_cpp_computes_what_transformers_computes(
    checkpoint: str, convert: Convert, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(checkpoint)
    ids = [(7 * i) % 320 for i in range(100)]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = llama_cpp_logits(convert(source), ids)
    assert np.ptp(expected) > 5  # or the tolerance would be too loose
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_rows_of_q_and_k_are_interleaved_for_adjacent_rotation() -> None:
    # Two heads of four rows: row i of a head rotates with row i + 2; in GGUF the two are adjacent.
    rows = torch.arange(8.0).unsqueeze(1) * torch.ones(1, 3)
    assert to_gguf.interleave_heads(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_stored_values_equal_the_checkpoint(kind: str, tiny: Path, convert: Convert) -> None:
    source = load_file(tiny / "model.safetensors")
    found = matrices(convert(tiny, kind))
    assert len(found) == len(source)
    for ours, theirs in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        expected = source[theirs].float()
        if kind == "F16" and expected.ndim > 1:  # subnormal float16 rounds; bfloat16 and float32 hold bfloat16
            expected = expected.half().float()
        np.testing.assert_array_equal(found[ours], expected.numpy())


def test_vectors_stay_float32_and_matrices_take_the_type(tiny: Path, convert: Convert) -> None:
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(convert(tiny, "BF16")).tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"BF16"}


def test_tied_output_matrix_is_not_written(tiny_tied: Path, convert: Convert) -> None:
    assert "output.weight" not in matrices(convert(tiny_tied))


def test_hyperparameters_are_the_config_values(tiny: Path, convert: Convert) -> None:
    found = fields(convert(tiny, "F16"))
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "llama.context_length": 256,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.engine
def test_llama_cpp_tokens_equal_the_tokenizer(tiny: Path, convert: Convert) -> None:
    path = convert(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = TEXT[:20000] + "x 1234567 \t\n\n don't 日本 🙂 ½²"
    expected = tokenizer(text, verbose=False).input_ids
    model = engine(path)
    assert model.tokenize(text.encode(), add_bos=True) == expected
    marked = f"{SPECIAL[1]}user hi{SPECIAL[2]}"
    assert model.tokenize(marked.encode(), add_bos=True, special=True) == tokenizer(marked).input_ids


def test_ids_beyond_the_tokenizer_are_marked_unused(tiny: Path, convert: Convert) -> None:
    found = fields(convert(tiny))
    types = found["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert types[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    assert len(types) == VOCABULARY
    assert types[320:] == [gguf.TokenType.UNUSED] * (VOCABULARY - 320)


def test_tokenizer_that_adds_bos_sets_add_bos_token(tiny: Path, tmp_path: Path, convert: Convert) -> None:
    source = tmp_path / "with-bos"
    shutil.copytree(tiny, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": SPECIAL[1], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fields(convert(source))["tokenizer.ggml.add_bos_token"] is True


def test_unknown_pre_tokenizer_is_refused(tiny: Path, tmp_path: Path, convert: Convert) -> None:
    source = tmp_path / "other"
    shutil.copytree(tiny, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"].pop(0)  # GPT-2's: runs of digits stay together
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(outputs.UsageError, match="pre-tokenizer"):
        convert(source)
    assert not list(tmp_path.glob("*.gguf"))


def test_float16_overflow_is_an_error(tiny: Path, tmp_path: Path, convert: Convert) -> None:
    source = tmp_path / "large"
    shutil.copytree(tiny, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(outputs.UsageError, match=r"up_proj.*float16"):
        convert(source, "F16")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


@pytest.fixture
def quantizer() -> Any:
    """demo/quantize_gguf.py, which needs llama.cpp."""
    pytest.importorskip("llama_cpp", reason="the demo's GGUF scripts need llama-cpp-python")
    import quantize_gguf

    return quantize_gguf


@pytest.mark.engine
def test_quantizer_writes_the_requested_type(
    quantizer: Any,
    tiny: Path,
    tmp_path: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = convert(tiny, "F32"), tmp_path / "q8.gguf"
    monkeypatch.setattr(sys, "argv", ["quantize_gguf.py", str(source), str(target), "q8_0"])
    quantizer.main()
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}
    assert "16 Q8_0, 5 F32" in capsys.readouterr().out
    expected, found = matrices(source)["blk.0.ffn_up.weight"], matrices(target)["blk.0.ffn_up.weight"]
    # 32 values share a scale of absmax / 127: nothing moves by more than half a step (float16 scale: a bit more).
    step = np.abs(expected).reshape(-1, 32).max(1) / 127
    error = np.abs(found - expected).reshape(-1, 32).max(1)
    assert (error <= step * 0.57).all()
    assert error.max() > 0
    with pytest.raises(outputs.UsageError, match="exists already"):
        quantizer.main()
    assert math.isfinite(found.sum())


@pytest.mark.engine
def test_quantizer_refuses_a_missing_file(quantizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize_gguf.py", str(tmp_path / "absent.gguf"), "out.gguf", "Q8_0"])
    with pytest.raises(outputs.UsageError, match=r"absent\.gguf: no such file"):
        quantizer.main()
