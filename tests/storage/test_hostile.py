"""Untrusted files: whatever they contain, the result is a StorageInfo or a StorageError that names the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmeval_ext.errors import UserError
from lmeval_ext.storage import StorageError, StorageInfo, inspect
from lmeval_ext.storage.__main__ import main
from lmeval_ext.storage.checkpoint import read_checkpoint
from lmeval_ext.storage.grouping import group_tensors
from lmeval_ext.storage.safetensors_header import read_header
from tests.fast_guard import examples
from tests.storage.builders import (
    FIXTURES,
    LLAMA,
    dense,
    finish_gguf,
    header_of,
    write_checkpoint,
    write_index,
    write_raw,
)

FAST = settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[Any, int, str]] = {
    "not UTF-8": (b'{"\xff": 1}', 0, "not UTF-8"),
    "not JSON": (b"{]", 0, "not valid JSON"),
    "a list": (b"[]", 0, "expected an object"),
    "deep": (b'{"a":' * 100_000, 0, "nested too deeply"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", 0, "not valid JSON"),
    "NaN": (b'{"a": NaN}', 0, "NaN is not JSON"),
    "a name twice": (
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
        16,
        "twice",
    ),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"U8","shape":[2,2],"data_offsets":[0,16]}}', 16, "twice"),
    "no tensors": ({}, 0, "no tensors"),
    "only metadata": ({"__metadata__": {"format": "pt"}}, 0, "no tensors"),
    "entry is a number": ({"a": 1}, 0, "exactly dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16, "exactly dtype, shape and data_offsets"),
    "more fields": ({"a": {**entry(), "x": 1}}, 16, "exactly dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry(dtype="F128")}, 16, "F128"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, 16, "dtype"),
    "negative size": ({"a": entry(shape=[-2, -2])}, 16, "list of at most"),
    "huge size": ({"a": entry(shape=[2**70])}, 16, "list of at most"),
    "size true": ({"a": entry(shape=[True, 4])}, 16, "list of at most"),
    "size 2.0": ({"a": entry(shape=[2.0, 2])}, 16, "list of at most"),
    "shape is text": ({"a": entry(shape="22")}, 16, "list of at most"),
    "many dimensions": ({"a": entry(shape=[1] * 1000)}, 16, "list of at most"),
    "product": ({"a": entry(shape=[2**60, 2**60])}, 16, "takes"),
    "too small a span": ({"a": entry(offsets=[0, 12])}, 16, "takes 16"),
    "reversed offsets": ({"a": entry(offsets=[16, 0])}, 16, "spans -16"),
    "negative offset": ({"a": entry(offsets=[-16, 0])}, 16, "two positions"),
    "three offsets": ({"a": entry(offsets=[0, 8, 16])}, 16, "two positions"),
    "overlap": ({"a": entry(), "b": entry(offsets=[8, 24])}, 24, "overlaps"),
    "same place": ({"a": entry(), "b": entry()}, 16, "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=[20, 36])}, 36, "hole"),
    "late start": ({"a": entry(offsets=[4, 20])}, 20, "hole"),
    "beyond the file": ({"a": entry()}, 15, "truncated"),
    "far beyond the file": ({"a": entry(shape=[2**40], offsets=[0, 2**42])}, 16, "truncated"),
    "bytes left over": ({"a": entry()}, 17, "longer than its tensors"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header_raises(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(StorageError, match=message) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too few"),
        (b"\x01\x00", "too few"),
        ((2**63).to_bytes(8, "little"), "announces a header"),
        ((3).to_bytes(8, "little") + b"{}", "announces a header of 3"),
    ],
)
def test_wrong_header_length_raises(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=message):
        inspect(path)


def test_header_beyond_the_format_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)
    with pytest.raises(StorageError, match="the limit is 100,000,000"):
        inspect(path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\m.safetensors",
        "C:m.safetensors",
        "..",
        "",
        "a\x00.safetensors",
    ],
)
def test_index_name_outside_the_folder_raises(tmp_path: Path, name: str) -> None:
    write_raw(tmp_path / "model.safetensors", *header_of(dense()))
    folder = tmp_path / "checkpoint"
    write_index(folder, {"lm_head.weight": name})
    with pytest.raises(StorageError, match="not a plain name"):
        inspect(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_broken_weight_map_raises(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(StorageError, match="no weight_map"):
        inspect(tmp_path)


def test_index_of_pickles_raises(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(StorageError, match="not a safetensors file"):
        inspect(tmp_path)


def test_empty_index_raises(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    with pytest.raises(StorageError, match="no tensors"):
        inspect(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_out_of_the_checkpoint_raises(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", dense(), LLAMA)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(StorageError, match="link out of the checkpoint"):
        inspect(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense(), LLAMA)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "f00"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert inspect(snapshot).layer_bpw == 16


def test_link_to_the_folder_is_followed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "real", dense(), LLAMA)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inspect(tmp_path / "link").layer_bpw == 16


def test_circular_link_raises(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(StorageError):
        inspect(tmp_path)


def test_fifo_raises_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(StorageError, match="not a regular file"):
            inspect(path)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"{", "JSON"), (b"\xff", "UTF-8"), (b"[1]", "an object"), (b"[" * 99_999, "deep")]
)
def test_broken_config_raises(tmp_path: Path, raw: bytes, message: str) -> None:
    write_checkpoint(tmp_path, dense())
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(StorageError, match=message) as caught:
        inspect(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_quantization_config_that_is_not_an_object_raises(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dense(), {**LLAMA, "quantization_config": [1]})
    with pytest.raises(StorageError, match="quantization_config is not an object"):
        inspect(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    """The file would end the process if it were unpickled, and it is not readable."""
    (tmp_path / name).write_bytes(b"cbuiltins\nexit\n(tR.")
    (tmp_path / name).chmod(0)
    with pytest.raises(StorageError, match=r"pickle.*safetensors"):
        inspect(tmp_path)
    with pytest.raises(StorageError, match=r"pickle"):
        inspect(tmp_path / name)


def test_empty_folder_and_missing_folder_raise(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no \.safetensors file and no \.gguf"):
        inspect(tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        inspect(tmp_path / "absent")


def test_storage_errors_are_user_errors() -> None:
    assert issubclass(StorageError, UserError)


def test_layer_number_of_thousands_of_digits_is_read(tmp_path: Path) -> None:
    spec = {**dense(), f"model.layers.{'9' * 5000}.x.weight": ("F16", (2, 2))}
    assert inspect(write_checkpoint(tmp_path, spec, LLAMA)).layer_bpw == 16


def test_negative_weight_shape_gives_null(tmp_path: Path) -> None:
    base = "model.layers.0.mlp.up_proj"
    spec = {
        f"{base}.weight_shape": ("I64", (2,)),
        f"{base}.weight_packed": ("I32", (8, 0)),
        f"{base}.weight_scale": ("F16", (8, 1)),
    }
    path = write_checkpoint(tmp_path, spec, LLAMA) / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    shape = (8).to_bytes(8, "little") + (-3).to_bytes(8, "little", signed=True)
    path.write_bytes(raw[:start] + shape + raw[start + 16 :])
    assert inspect(tmp_path).layer_elements is None


# --- properties -----------------------------------------------------------------------------------------------------

NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
specs = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=4)),
    min_size=1,
    max_size=8,
)


@FAST
@given(spec=specs)
def test_library_headers_are_read_as_written(tmp_path: Path, spec: dict[str, tuple[str, list[int]]]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in spec.items()}, path)
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == spec
    assert all(tensor.nbytes == prod(tensor.shape) * NUMPY[tensor.dtype]().itemsize for tensor in tensors.values())


@FAST
@given(data=st.data())
def test_accepted_headers_are_accepted_by_the_library(tmp_path: Path, data: st.DataObject) -> None:
    """With any bytes of a real header changed: no other exception, and never more lenient than safetensors."""
    path = write_raw(tmp_path / "model.safetensors", *header_of(dense(layers=1)))
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        tensors = read_header(path)
        assert isinstance(inspect(path), StorageInfo)
    except StorageError:
        return
    try:
        with safe_open(path, "np") as library:
            assert sorted(library.keys()) == sorted(tensor.name for tensor in tensors)
    except SafetensorError as error:
        pytest.fail(f"accepted here, but safetensors says {error}")


MODULES = (
    "model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens", "visual.x", "model.layers.9.a",
    "model.layers.0.mlp.gate",
)  # fmt: skip
SUFFIXES = (
    ".weight", ".weight_packed", ".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_scale_2",
    ".weight_scale_inv", ".qweight", ".qzeros", ".scales", ".g_idx", ".trellis", ".suh", ".svh", ".q_weight",
    ".q_scale", ".q_invperm", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4", ".SCB", ".bias",
    "_blocks", "_scales",
)  # fmt: skip
METHODS = (
    "compressed-tensors", "modelopt", "awq", "gptq", "bitsandbytes", "exl2", "exl3", "fp8", "vptq", "mxfp4", "x",
)  # fmt: skip
DTYPES = ("U8", "I8", "F8_E4M3", "F16", "BF16", "I16", "F32", "I32", "I64")
tensors = st.dictionaries(
    st.tuples(st.sampled_from(MODULES), st.sampled_from(SUFFIXES)).map("".join),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 70), max_size=3).map(tuple)),
    min_size=1,
    max_size=14,
)
scalars = st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
quantizations = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(METHODS) | json_values},
    optional=dict.fromkeys(
        ("bits", "config_groups", "group_size", "quant_algo", "quantization", "load_in_8bit"), json_values
    ),
)
configs = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("num_hidden_layers", "tie_word_embeddings", "architectures", "text_config"), json_values),
        "quantization_config": quantizations,
    },
)


@FAST
@given(spec=tensors, config=configs)
def test_bits_of_any_tensors_and_config_add_up(tmp_path: Path, spec: Any, config: Any) -> None:
    try:
        info = inspect(write_checkpoint(tmp_path, spec, config))
    except StorageError:
        return
    _, size = header_of(spec)
    assert info.weight_bytes == size
    checkpoint = read_checkpoint(tmp_path)
    assert sum(weight.bits for weight in group_tensors(checkpoint.tensors, checkpoint.facts)) == 8 * size
    if info.layer_bits is not None and info.head_bits is not None:
        assert info.layer_bits + info.head_bits + sum(part.bits for part in info.excluded) == 8 * size
    assert json.loads(json.dumps(info.to_dict(), allow_nan=False)) == info.to_dict()
    if info.layer_bpw is None or info.head_bpw is None:
        assert info.vram_gb is None
        assert info.notes


@FAST
@given(data=st.data())
def test_changed_gguf_header_gives_figures_or_names_the_file(tmp_path: Path, data: st.DataObject) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    if not path.exists():
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a", "b"])
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 32), np.float16))
        finish_gguf(writer)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(raw)
    try:
        assert isinstance(inspect(changed), StorageInfo)
    except StorageError as error:
        message = str(error)
    else:
        message = str(changed)
    assert str(changed) in message


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_prints_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, dense(), LLAMA)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "layer_bpw               16.000000" in printed
    assert "not counted: embedding" in printed


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, dense(), LLAMA)
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(tmp_path).to_dict()


def test_command_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert str(tmp_path) in output.err


def test_command_starts_without_torch_transformers_or_gguf(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dense(), LLAMA)
    code = (
        "import sys; from lmeval_ext.storage.__main__ import main; "
        f"assert main([{str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'transformers', 'gguf', 'numpy', 'compressed_tensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_fixtures_are_small() -> None:
    assert sum(file.stat().st_size for file in FIXTURES.iterdir()) < 1_000_000
