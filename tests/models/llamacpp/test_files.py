"""What a GGUF file is, and what llama.cpp says of it: warnings, files that hold no causal model, vocabularies."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from tests.conftest import evaluate
from tests.models.llamacpp import tiny_gguf

pytestmark = pytest.mark.engine
WORDS = "the river in the city and the music of the year "


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.llama(tmp_path_factory.mktemp("gguf") / "llama.gguf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def notes(model: Any) -> list[str]:
    return list(model.get_model_info()["quantization"]["notes"])


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        get_model("llamacpp")(pretrained=str(path), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ------------------------------------------------------------------ warnings


def test_file_without_pre_tokenizer_warns_and_notes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A GGUF of before May 2024; llama.cpp's own words (llama-vocab.cpp)."""
    path = tiny_gguf.llama(tmp_path / "old.gguf", pre=None)
    with caplog.at_level(logging.WARNING):
        model = get_model("llamacpp")(pretrained=str(path), max_length=64)
    expected = "missing pre-tokenizer type, using: 'default'"
    assert [r.getMessage() for r in caplog.records if expected in r.getMessage()]
    assert f"llama.cpp warns: {expected}" in notes(model)
    assert any("GENERATION QUALITY WILL BE DEGRADED" in note for note in notes(model))
    warnings = [note for note in notes(model) if "warns" in note]
    assert len(warnings) == 3, warnings  # decoration is left out


def test_healthy_file_has_no_warning(model_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lmeval_ext.models.llamacpp.vocabulary import GGUFTokenizer

    with caplog.at_level(logging.WARNING):
        GGUFTokenizer(str(model_file))
    assert not [r for r in caplog.records if "llama.cpp warns" in r.getMessage()]
    for arguments in ({}, {"swa_full": "on"}):
        assert [n for n in notes(get_model("llamacpp")(pretrained=str(model_file), **arguments)) if "warns" in n] == []


def test_full_sliding_window_cache_is_no_warning(tmp_path: Path) -> None:
    """llama-cpp-python's default; it concerns memory only."""
    model = get_model("llamacpp")(pretrained=str(tiny_gguf.gemma3(tmp_path / "gemma3.gguf")), max_length=64)
    assert [note for note in notes(model) if "warns" in note] == []


def test_warnings_of_one_kind_are_one_note() -> None:
    from lmeval_ext.models.llamacpp.binding import LoadMessages

    messages = LoadMessages()
    for number in range(3):
        messages.add(3, f"load: control-looking token: {number} '<{number}>' was not ")
        messages.add(5, "control-type\n")
    messages.add(2, "load: this is information\n")
    assert messages.warnings() == ["control-looking token: 0 '<0>' was not control-type (and 2 more like this)"]


def test_reason_of_llama_cpp_is_in_the_error(model_file: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "missing.gguf", "llama", {"token_embd.weight": np.ones((9, 64))},
                           tiny_gguf.attention_metadata)  # fmt: skip
    message = refusal(path)
    assert "2 layers, but holds 1 tensors" in message
    random = tiny_gguf.Random()
    tensors = random.embeddings() | random.layers()
    del tensors["blk.1.ffn_up.weight"]
    path = tiny_gguf.write(tmp_path / "missing.gguf", "llama", tensors, tiny_gguf.attention_metadata)
    assert "tensor 'blk.1.ffn_up.weight' not found" in refusal(path)


# ------------------------------------------------------------------ files that hold no causal model


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("llama", gguf.GGUFType.IMATRIX, "importance matrix"),
        ("clip", None, "multimodal projector"),
        ("llama", gguf.GGUFType.ADAPTER, "LoRA adapter"),
        ("controlvector", None, "control vector"),
    ],
)
def test_file_that_holds_no_model_is_refused(tmp_path: Path, architecture: str, kind: str | None, words: str) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        if kind:
            writer.add_type(kind)

    path = tiny_gguf.write(tmp_path / "file.gguf", architecture, {"blk.0.attn_q.weight": np.ones((4, 32))}, metadata)
    assert words in refusal(path)


def test_folder_of_a_model_with_its_projector_is_the_model(model_file: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "model.gguf")
    tiny_gguf.write(tmp_path / "vision.gguf", "clip", {"v.blk.0.attn_q.weight": np.ones((4, 32))}, lambda writer: None)
    assert get_model("llamacpp")(pretrained=str(tmp_path), max_length=64).path.endswith("model.gguf")


def test_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf.llama(tmp_path / "embedding.gguf", more=lambda writer: writer.add_causal_attention(False))
    assert "attend to later ones" in refusal(path)


def test_learned_positions_limit_the_context(tmp_path: Path) -> None:
    """GPT-2 has an embedding per position: llama.cpp aborts beyond the last."""
    path = tiny_gguf.gpt2(tmp_path / "gpt2.gguf")
    model = get_model("llamacpp")(pretrained=str(path))
    assert model.max_length == 64
    assert [note for note in notes(model) if "warns" in note] == []  # llama.cpp rounds the context up to 256
    assert "each of 64 positions" in refusal(path, max_length=65)


# ------------------------------------------------------------------ special tokens in a text


@pytest.mark.parametrize("special", ["<unk>", "<s>", "</s>"])
def test_special_token_in_a_text_is_scored_on_the_tokenizers_id(
    model_file: Path, tokenizer: Path, tmp_path: Path, special: str
) -> None:
    """PTB has <unk> in nearly every line. The windows are those of Transformers' ids."""
    from transformers import AutoTokenizer

    from lmeval_ext.tasks.tokenizers import load_tokenizer

    text = (WORDS + f"{special} of N \n") * 8
    loaded = load_tokenizer({"pretrained": str(model_file), "tokenizer": str(tokenizer)})
    expected = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False)["input_ids"]
    assert loaded.encode(text).ids.tolist() == expected
    assert tiny_gguf.SPECIAL.index(special) in expected
    (tmp_path / "text.txt").write_text(text)
    model = {"pretrained": str(model_file), "tokenizer": str(tokenizer)}
    metadata = {"text_path": str(tmp_path / "text.txt"), "eval_len": 64, "stride": 64, "max_rows": 2}
    samples = evaluate("llamacpp", "wiki2_strided", metadata=metadata, **model)["samples"]["wiki2_strided"]
    assert len(samples) == 2


def test_special_token_that_the_file_does_not_know_is_the_reason(tokenizer: Path, tmp_path: Path) -> None:
    """A converter that made <unk> a normal token."""
    from lmeval_ext.tasks.tokenizers import load_tokenizer

    path = tiny_gguf.llama(tmp_path / "model.gguf", types={"<unk>": gguf.TokenType.NORMAL})
    loaded = load_tokenizer({"pretrained": str(path), "tokenizer": str(tokenizer)})
    with pytest.raises(UserError, match=r"the text spells special tokens \('<unk>'\), which the two treat differently"):
        loaded.encode(WORDS + "<unk> " + WORDS)
    assert len(loaded.encode(WORDS).ids)


def test_vocabulary_that_differs_beside_special_tokens_blames_the_conversion(tokenizer: Path, tmp_path: Path) -> None:
    from lmeval_ext.tasks.tokenizers import load_tokenizer

    path = tiny_gguf.llama(tmp_path / "model.gguf", merges=["h e"])  # " t" stays two tokens
    loaded = load_tokenizer({"pretrained": str(path), "tokenizer": str(tokenizer)})
    for text in (WORDS, WORDS + "in <unk> " + WORDS):
        with pytest.raises(UserError, match="convert the GGUF again"):
            loaded.encode(text)
