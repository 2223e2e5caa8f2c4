"""Tensor types of forks, removed types, and GGUF files that hold no model: one line that says what they are."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from lmeval_ext.storage import StorageError, inspect
from lmeval_ext.storage.gguf_header import NEWEST_TYPE
from tests.storage.builders import finish_gguf


def header_with_type(path: Path, number: int) -> Path:
    """Writes a GGUF file with one tensor of any type number, which gguf's own writer refuses for unknown ones."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("blk.0.attn_q.weight") + struct.pack("<IQQIQ", 2, 1024, 1024, number, 0)
    path.write_bytes(head + bytes(-len(head) % 32 + 4096))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(StorageError) as caught:
        inspect(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("number", "name"), [(139, "IQ4_K "), (156, "IQ3_KS "), (202, "Q4_0_R8 "), (337, "IQ2_K_R4 "), (142, ""), (500, "")]
)
def test_type_of_ik_llama_names_the_fork(tmp_path: Path, number: int, name: str) -> None:
    """Numbers from ik_llama.cpp's ggml.h; 142 was withdrawn there and taken up by another fork."""
    message = refusal(header_with_type(tmp_path / "model.gguf", number))
    assert f"type {number}, {name}of the fork ik_llama.cpp" in message
    assert "pip install" not in message
    assert "download the file again" not in message.lower()


@pytest.mark.parametrize(
    ("number", "words"), [(4, "Q4_2"), (31, "repacked Q4_0"), (33, "repacked Q4_0"), (36, "I2_S of bitnet.cpp")]
)
def test_removed_type_is_called_removed(tmp_path: Path, number: int, words: str) -> None:
    message = refusal(header_with_type(tmp_path / "model.gguf", number))
    assert words in message
    assert "removed" in message
    assert "pip install" not in message


def test_type_after_the_newest_one_may_need_a_newer_gguf(tmp_path: Path) -> None:
    message = refusal(header_with_type(tmp_path / "model.gguf", NEWEST_TYPE + 1))
    assert "pip install -U gguf" in message
    assert "fork" in message


def write(path: Path, architecture: str, kind: str | None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if kind:
        writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 32), np.float32))
    finish_gguf(writer)
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("llama", "imatrix", "importance matrix"),
        ("llama", "adapter", "LoRA"),
        ("controlvector", None, "control vector"),
    ],
)
def test_file_without_a_model_says_what_it_holds(tmp_path: Path, architecture: str, kind: str, words: str) -> None:
    assert words in refusal(write(tmp_path / "file.gguf", architecture, kind))


def test_folder_with_an_importance_matrix_is_its_model(tmp_path: Path) -> None:
    write(tmp_path / "a-imatrix.gguf", "llama", "imatrix")
    write(tmp_path / "model.gguf", "llama", "model")
    assert inspect(tmp_path).weight_bytes == 4 * 32 * 4


def test_folder_with_two_models_still_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, "llama", "model")
    assert "holds 2 GGUF models" in refusal(tmp_path)
