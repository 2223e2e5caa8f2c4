"""GGUF: files written by gguf's own writer, against the sizes that gguf's own reader reports."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from lmeval_ext.storage import StorageError, inspect
from tests.storage.builders import finish_gguf

TYPES = sorted(GGML_QUANT_SIZES, key=lambda kind: kind.value)
DIRECT = {
    GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8, GGMLQuantizationType.I16: np.int16, GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}  # fmt: skip


def add(writer: gguf.GGUFWriter, name: str, kind: GGMLQuantizationType, rows: int, columns: int) -> None:
    """Add a matrix of zeros in any type; quantized ones are given as bytes."""
    if kind in DIRECT:
        writer.add_tensor(name, np.zeros((rows, columns), DIRECT[kind]))
        return
    block, size = GGML_QUANT_SIZES[kind]
    writer.add_tensor(name, np.zeros((rows, columns // block * size), np.uint8), raw_dtype=kind)


def model(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q4_K,
    *,
    head: bool = True,
    file_type: int | None = LlamaFileType.MOSTLY_Q4_K_M,
    extra: Any = None,
    drafts: int = 0,
    **options: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_block_count(2)
    writer.add_token_list([f"token {number}" for number in range(40)])
    if file_type is not None:
        writer.add_file_type(file_type)
    if drafts:
        writer.add_uint32("llama.nextn_predict_layers", drafts)
    add(writer, "token_embd.weight", GGMLQuantizationType.Q8_0, 40, 256)
    if head:
        add(writer, "output.weight", GGMLQuantizationType.Q6_K, 40, 256)
    writer.add_tensor("output_norm.weight", np.zeros(256, np.float32))
    for layer in range(2):
        add(writer, f"blk.{layer}.attn_qkv.weight", kind, 48, 256)
        add(writer, f"blk.{layer}.ffn_down.weight", GGMLQuantizationType.Q6_K, 32, 256)
        add(writer, f"blk.{layer}.ffn_gate_inp.weight", GGMLQuantizationType.F32, 8, 256)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.zeros(256, np.float32))
    if extra:
        extra(writer)
    finish_gguf(writer)
    return path


def by_the_reader(path: Path, pattern: str) -> tuple[int, int]:
    """Return bits and elements of the tensors whose names match, from gguf's own reader."""
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if re.search(pattern, tensor.name)]
    return 8 * sum(int(tensor.n_bytes) for tensor in tensors), sum(int(tensor.n_elements) for tensor in tensors)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_matches_ggufs_own_sizes(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = model(tmp_path / "model.gguf", kind)
    info = inspect(path)
    assert (info.layer_bits, info.layer_elements) == by_the_reader(path, r"attn_qkv|ffn_down")
    assert (info.head_bits, info.head_elements) == by_the_reader(path, r"^output\.weight")
    bits, elements = by_the_reader(path, "")
    assert (info.weight_bytes, info.elements) == (bits // 8, elements)
    assert info.file_bpw == bits / elements
    assert (info.family, info.scheme, info.tied) == ("GGUF", "Q4_K_M", False)


def test_q4_k_matches_figures_by_hand(tmp_path: Path) -> None:
    """Q4_K stores 256 weights in 144 bytes, Q6_K in 210: ggml-common.h, block_q4_K and block_q6_K."""
    info = inspect(model(tmp_path / "model.gguf"))
    assert info.layer_bpw == (48 * 144 + 32 * 210) * 8 / (80 * 256)
    assert info.head_bpw == 210 * 8 / 256
    kinds = {part.kind: (part.bits, part.elements) for part in info.excluded}
    assert kinds == {
        "embedding": (40 * 256 // 32 * 34 * 8, 40 * 256),
        "router": (2 * 8 * 256 * 32, 2 * 8 * 256),
        "other": (3 * 256 * 32, 3 * 256),
    }


def test_tied_embedding_is_the_head(tmp_path: Path) -> None:
    info = inspect(model(tmp_path / "model.gguf", head=False))
    assert info.head_bpw == 8.5
    assert info.tied is True
    assert any("tied" in note for note in info.notes)


def test_expert_biases_are_not_weights(tmp_path: Path) -> None:
    def expert_bias(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up_exps.bias", np.zeros((8, 256), np.float32))

    plain = inspect(model(tmp_path / "plain.gguf"))
    assert inspect(model(tmp_path / "model.gguf", extra=expert_bias)).layer_bits == plain.layer_bits


def test_fused_experts_count_all_dimensions(tmp_path: Path) -> None:
    def experts(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(
            "blk.0.ffn_up_exps.weight", np.zeros((8, 16, 144), np.uint8), raw_dtype=GGMLQuantizationType.Q4_K
        )

    plain = inspect(model(tmp_path / "plain.gguf"))
    info = inspect(model(tmp_path / "model.gguf", extra=experts))
    assert plain.layer_elements is not None
    assert info.layer_elements == plain.layer_elements + 8 * 16 * 256
    assert info.layer_bits == plain.layer_bits + 8 * 16 * 144 * 8


def test_draft_blocks_are_excluded(tmp_path: Path) -> None:
    """nextn_predict_layers = 1 of block_count = 2: blk.1 is the draft."""
    info = inspect(model(tmp_path / "model.gguf", drafts=1))
    assert info.layer_elements == 80 * 256
    drafts = [part for part in info.excluded if part.kind == "draft"]
    assert [part.elements for part in drafts] == [(80 + 8 + 1) * 256]


def test_projector_file_has_no_layer_figure(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    add(writer, "v.blk.0.attn_q.weight", GGMLQuantizationType.F16, 4, 32)
    finish_gguf(writer)
    info = inspect(tmp_path / "mmproj.gguf")
    assert (info.layer_bpw, info.head_bpw, info.vram_gb) == (None, None, None)
    assert [part.kind for part in info.excluded] == ["vision"]
    assert info.file_bpw == 16


@pytest.mark.parametrize(
    ("file_type", "scheme"), [(None, None), (7, "Q8_0"), (0, "F32"), (1024 + 15, "Q4_K_M"), (999, None)]
)
def test_scheme_is_the_file_type_or_null(tmp_path: Path, file_type: int | None, scheme: str | None) -> None:
    info = inspect(model(tmp_path / "model.gguf", file_type=file_type))
    assert info.scheme == scheme
    assert (scheme is None) == any("file_type" in note for note in info.notes)


@pytest.mark.parametrize("alignment", [32, 4096])
@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_alignment_and_byte_order_are_respected(tmp_path: Path, alignment: int, endian: gguf.GGUFEndian) -> None:
    def align(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)

    path = model(tmp_path / "model.gguf", endianess=endian, extra=align, kind=GGMLQuantizationType.F16)
    assert inspect(path).weight_bytes == by_the_reader(path, "")[0] // 8


def test_every_kind_of_metadata_is_skipped(tmp_path: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        integers = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
        values: dict[str, Any] = {**dict.fromkeys(integers, 1), "float32": 0.5, "float64": 0.25, "bool": True}
        for kind, value in {**values, "string": "ü" * 100_000}.items():
            getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        writer.add_array("x.ints", [1, 2, 3])
        writer.add_array("x.floats", [0.5])
        writer.add_array("x.flags", [True, False])

    path = model(tmp_path / "model.gguf", extra=metadata)
    assert inspect(path).weight_bytes == by_the_reader(path, "")[0] // 8


def split(folder: Path) -> list[Path]:
    """Write the model in parts of at most four tensors with gguf's own splitter."""
    model(folder / "model.gguf", split_max_tensors=4)
    return sorted(folder.glob("*.gguf"))


def test_any_part_of_a_split_file_reads_all_parts(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    single = inspect(model(tmp_path / "single" / "model.gguf"))
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts")
    assert len(parts) == 3
    for path in [*parts, tmp_path / "parts"]:
        info = inspect(path)
        assert (info.layer_bpw, info.head_bpw, info.file_bpw) == (single.layer_bpw, single.head_bpw, single.file_bpw)
        assert (info.weight_bytes, info.scheme) == (single.weight_bytes, "Q4_K_M")


def test_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(StorageError, match=re.escape(parts[1].name)):
        inspect(parts[2])


def test_renamed_part_error_gives_the_expected_name(tmp_path: Path) -> None:
    parts = split(tmp_path)
    with pytest.raises(StorageError, match="00001-of-00003"):
        inspect(parts[1].rename(tmp_path / "part.gguf"))


def test_swapped_parts_raise(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    with pytest.raises(StorageError, match="is not part 2 of 3"):
        inspect(parts[0])


def test_two_models_in_a_folder_raise_and_are_named(tmp_path: Path) -> None:
    model(tmp_path / "a.gguf")
    model(tmp_path / "b.gguf")
    with pytest.raises(StorageError, match=r"a\.gguf, b\.gguf"):
        inspect(tmp_path)


def header(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    """Return a little-endian GGUF header with any counts, followed by `rest`."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "empty": (b"", "magic"),
    "magic": (b"GGUX" + bytes(60), "magic"),
    "version": (header(version=9), "version 9"),
    "cut": (b"GGUF\x03\x00\x00\x00\x01", "truncated"),
    "tensors": (header(tensors=2**60), "tensors"),
    "keys": (header(keys=2**60), "metadata keys"),
    "key length": (header(keys=1, rest=struct.pack("<Q", 2**63)), "string"),
    "key not UTF-8": (header(keys=1, rest=text(b"\xff\xfe") + bytes(16)), "UTF-8"),
    "unknown kind": (header(keys=1, rest=text(b"a") + struct.pack("<I", 99)), "type 99"),
    "array length": (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 2**62)), "truncated"),
    "strings": (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 2**40)), "strings in an array"),
    "string in array": (header(keys=1, rest=text(b"a") + struct.pack("<IIQQ", 9, 8, 1, 2**64 - 8)), "truncated"),
    "array of arrays": (header(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
    "same key": (header(keys=2, rest=2 * (text(b"a") + struct.pack("<IB", 0, 1))), "twice"),
    "alignment": (
        header(tensors=1, keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3) + tensor(b"a", [1])),
        "power of two",
    ),
    "no tensors": (header(), "no tensors"),
    "dimensions": (header(tensors=1, rest=text(b"a") + struct.pack("<I", 2**31)), "dimensions"),
    "tensor type": (header(tensors=1, rest=tensor(b"a", [4], kind=250)), "fork ik_llama"),
    "part of a block": (header(tensors=1, rest=tensor(b"a", [33], kind=8) + bytes(64)), "whole blocks of 32"),
    "data": (header(tensors=1, rest=tensor(b"a", [2**60, 2**60])), "truncated"),
    "offset": (header(tensors=1, rest=tensor(b"a", [4], offset=2**62) + bytes(64)), "truncated"),
    "overlap": (header(tensors=2, rest=tensor(b"a", [4]) + tensor(b"b", [4], offset=8) + bytes(99)), "overlap"),
    "same name": (header(tensors=2, rest=tensor(b"a", [4]) + tensor(b"a", [4], offset=32) + bytes(99)), "same name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_raises_one_clear_error(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=message) as caught:
        inspect(path)
    assert str(path) in str(caught.value)


def test_truncated_file_raises(tmp_path: Path) -> None:
    raw = model(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 1200, 37), len(raw) - 4000]:
        path.write_bytes(raw[:length])
        with pytest.raises(StorageError):
            inspect(path)
