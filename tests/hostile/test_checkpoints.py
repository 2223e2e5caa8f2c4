"""Damaged and hostile checkpoints in the adapters: one clear line that names the file, and no figure."""

from __future__ import annotations

import json
import runpy
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from lmeval_ext.errors import UserError
from lmeval_ext.storage.gguf_header import read_gguf
from tests.conftest import ROOT, run

pytestmark = pytest.mark.slow  # each runs an engine or a whole command

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MISSING = "model.layers.1.mlp.up_proj.weight"


def refusal(name: str, **arguments: Any) -> str:
    """Return the message, one line, with which an adapter refuses a checkpoint."""
    with pytest.raises(UserError) as caught:
        get_model(name)(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def cut(part: str) -> Callable[[Path], None]:
    """Return a function that truncates the weights in one section of the file, or right after it."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        raw = path.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        ends = {"nothing": 0, "length": 5, "header's start": 8, "header": header // 2, "header's end": header,
                "first tensor": header + 100, "last byte": len(raw) - 1}  # fmt: skip
        path.write_bytes(raw[: ends[part]])

    return damage


def change(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return a function that replaces the content of a file, or removes it for None."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True) if content is None else (folder / name).write_bytes(content)

    return damage


def no_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        file.unlink()


def foreign_index(folder: Path) -> None:
    """Move all tensors to an undamaged file outside the folder."""
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(outside), "../outside.safetensors")}))


def broken_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text('{"weight_map":')


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[MISSING]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (change("config.json", None), "no config.json there"),
    "config not JSON": (change("config.json", b"{"), "config.json is not valid JSON"),
    "config a list": (change("config.json", b"[1]"), "expected an object"),
    "config empty": (change("config.json", b"{}"), "config.json"),
    "no weights": (change(WEIGHTS, None), "no .safetensors file"),
    **{f"cut: {part}": (cut(part), words) for part, words in (
        ("nothing", "too few"), ("length", "too few"), ("header's start", "announces a header"),
        ("header", "announces a header"), ("header's end", "truncated"), ("first tensor", "truncated"),
        ("last byte", "truncated"))},
    "index out of the folder": (foreign_index, "'../outside.safetensors' in the shard index is not a plain name"),
    "index not JSON": (broken_index, f"{INDEX} is not valid JSON"),
    "a tensor is missing": (missing_tensor, MISSING),
    "no tokenizer": (no_tokenizer, "no tokenizer there"),
    "tokenizer not JSON": (change("tokenizer.json", b"{"), "tokenizer.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_transformers_checkpoint_is_refused(checkpoint: Path, damage: str) -> None:
    apply, words = DAMAGES[damage]
    apply(checkpoint)
    message = refusal("hf_quant", pretrained=str(checkpoint), dtype="float32", device="cpu")
    assert words in message
    assert str(checkpoint) in message


@pytest.mark.engine
def test_tokenizer_from_another_folder_is_accepted(checkpoint: Path, tiny_llama: Path) -> None:
    no_tokenizer(checkpoint)
    model = get_model("hf_quant")(pretrained=str(checkpoint), tokenizer=str(tiny_llama), device="cpu")
    assert model.tok_encode("a")


# ------------------------------------------------------------------ GGUF


@pytest.fixture(scope="module")
def gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demo")
        patch.setattr("sys.argv", ["to_gguf.py", str(tiny_llama), str(file), "--type", "F32"])
        runpy.run_path(str(ROOT / "demo" / "to_gguf.py"), run_name="__main__")
    return file.read_bytes()


def overwrite(raw: bytes, at: int, value: int, kind: str = "<Q") -> bytes:
    changed = bytearray(raw)
    struct.pack_into(kind, changed, at, value)
    return bytes(changed)


def after(raw: bytes, name: bytes, more: int) -> int:
    """Return the position `more` bytes after a name in the header."""
    return raw.index(name) + len(name) + more


TENSOR = b"blk.0.ffn_up.weight"  # then: number of dimensions, two sizes, type, offset
COUNTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "many tensors": (lambda raw: overwrite(raw, 8, 2**40), "announces 1,099,511,627,776 tensors"),
    "a tensor more": (lambda raw: overwrite(raw, 8, raw[8] + 1), "could not load"),
    "a tensor less": (lambda raw: overwrite(raw, 8, raw[8] - 1), "could not load"),
    "no tensors": (lambda raw: overwrite(raw, 8, 0), "no tensors"),
    "many keys": (lambda raw: overwrite(raw, 16, 2**62), "metadata keys"),
    "a key more": (lambda raw: overwrite(raw, 16, raw[16] + 1), "could not load"),
    "many words": (lambda raw: overwrite(raw, after(raw, b"tokenizer.ggml.tokens", 8), 2**50), "strings in an array"),
    "no layers": (lambda raw: overwrite(raw, after(raw, b"llama.block_count", 4), 0, "<I"), "declares 0 layers"),
    "many layers": (lambda raw: overwrite(raw, after(raw, b"llama.block_count", 4), 2**31, "<I"), "2147483648 layers"),
    "five dimensions": (lambda raw: overwrite(raw, after(raw, TENSOR, 0), 5, "<I"), "5 dimensions"),
    "huge size": (lambda raw: overwrite(raw, after(raw, TENSOR, 4), 2**40), "could not load"),
    "unknown type": (lambda raw: overwrite(raw, after(raw, TENSOR, 20), 999, "<I"), "type 999"),
    "far offset": (lambda raw: overwrite(raw, after(raw, TENSOR, 24), 2**40), "truncated"),
    "cut in the counts": (lambda raw: raw[:12], "truncated"),
    "cut in the keys": (lambda raw: raw[:300], "truncated"),
    "cut in the data": (lambda raw: raw[:-1], "truncated"),
    "empty": (lambda raw: b"", "is not a GGUF file"),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("case", COUNTS)
def test_damaged_gguf_file_is_refused(
    gguf: bytes, tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two of these files abort llama.cpp, and this process with it, unless the adapter checks the file first."""
    change_bytes, words = COUNTS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(change_bytes(gguf))
    message = refusal("llamacpp", pretrained=str(path))
    assert words in message
    assert str(path) in message


@pytest.mark.engine
def test_undamaged_gguf_file_loads(gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf)
    assert get_model("llamacpp")(pretrained=str(path)).tok_encode("a")
    assert len(read_gguf(path).tensors) == gguf[8]


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_command_fails_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    done = run("lm_eval", "run", "--model", "hf_quant", "--model_args", f"pretrained={checkpoint}", "--tasks",
               "sample_strided", "--output_path", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    last = [line for line in done.stderr.splitlines() if "error" in line.lower()][-1]
    assert last.startswith(f"lmeval-ext: error: {weights} is truncated")
    assert not list((tmp_path / "out").rglob("*.json"))
