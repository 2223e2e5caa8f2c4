"""The header of one safetensors file: 8 bytes of length, then JSON.

Layout and rules: https://github.com/huggingface/safetensors, README "Format" and `safetensors/src/tensor.rs`.
The header is parsed here because the library maps the whole file, does not show offsets, silently keeps the last of
two equal keys and does not name the file in its errors. The tests check that both accept the same files.

A header that is written exactly as the library writes it is read without a JSON parser, in a tenth of the time
(`_compact`, `header_runs`). Any other header goes through the parser and a check of every field (`_parsed`), which
words the errors. Both give the same columns.

`DTYPE_BITS` has one row per dtype: its name in the header and its bits per element. To add a dtype, add its row, and
name it in FLOATS or FLOAT8 if a dense weight may be stored in it.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from lmeval_ext.storage.header_runs import END, Runs
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, unreadable
from lmeval_ext.storage.json_file import MAX_BYTES, parse_object
from lmeval_ext.storage.tensors import Form, Header, StoredTensor

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
MAX_DIMENSIONS = 16
# The library's own form of a header: metadata of plain texts first, then one entry per tensor, without spaces.
_NOT_COMPACT = bytes(range(32)) + b"\\\x7f"  # no control characters and no escapes
_START = re.compile(r'\{(?:"__metadata__":(\{[^{}]*\}),)?"')
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_FORM = re.compile(rf'"dtype":"(\w+)","shape":\[((?:{_NUMBER}(?:,{_NUMBER}){{0,{MAX_DIMENSIONS - 1}}})?)\]')
_QUOTES_PER_TENSOR = 10


def new_runs() -> Runs:
    """Return the collection of runs for the headers of one checkpoint."""
    return Runs(_form)


def read_header(path: Path, runs: Runs | None = None) -> Header:
    """Return the tensors of a safetensors file, in the order of their data.

    runs: those of the files that were read before, to which this file's are added.

    Raises StorageError if the header is truncated or malformed, if the bytes of a tensor are not dtype x shape, or if
    the tensors do not cover the rest of the file exactly, without overlap or hole (the format's own rule).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise StorageError(f"{path} has {size} bytes, too few for a safetensors header. {DOWNLOAD_AGAIN}")
            if length > min(size - 8, MAX_BYTES):
                limit = f"the file has {size:,} bytes" if length > size - 8 else f"the limit is {MAX_BYTES:,}"
                raise StorageError(f"{path} announces a header of {length:,} bytes, but {limit}. {DOWNLOAD_AGAIN}")
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    if runs is None:
        return header_tensors(path, raw, size)[0]
    compact = _compact(path, raw, size, runs) if runs.complete else None
    runs.complete = compact is not None
    return compact[0] if compact else _parsed(path, raw, size)[0]


def header_tensors(path: Path, raw: bytes, size: int) -> tuple[Header, dict[str, Any]]:
    """Parse the header `raw` of a file of `size` bytes.

    Returns the tensors, in the order of their data, and the metadata. Raises StorageError as `read_header` does.
    """
    return _compact(path, raw, size) or _parsed(path, raw, size)


def _compact(path: Path, raw: bytes, size: int, shared: Runs | None = None) -> tuple[Header, dict[str, Any]] | None:
    """Parse a header that is written as the library writes it; None for any other, and for any that has an error.

    shared: the runs of the files before this one; after None they hold a part of this file and are not to be used.
    """
    if not raw.isascii() or len(raw.translate(None, _NOT_COMPACT)) != len(raw):
        return None
    text = raw.decode("ascii").rstrip(" ")
    start = _START.match(text)
    if not start or not text.endswith("]}}"):
        return None
    runs = shared or new_runs()
    runs.file += 1
    try:
        names, forms, position = runs.scan(text[start.end() : -2] + END)
    except ValueError:  # a separator is missing, or a form is not known
        return None
    # A quotation mark in a name, or a field between the known ones, changes the number of quotation marks.
    quotes = text.count('"', start.end() - 1)
    if quotes != _QUOTES_PER_TENSOR * len(names) or len(set(names)) != len(names) or 8 + len(raw) + position != size:
        return None
    metadata = parse_object(start[1].encode(), f"the metadata of {path}", DOWNLOAD_AGAIN) if start[1] else {}
    if "__metadata__" in names:
        return None
    return Header(path, names, forms, 8 + len(raw), None if shared else runs.all), metadata


def _form(described: str) -> Form:
    """Return the form that the text `"dtype":…,"shape":…` describes. Raises ValueError if it is not exactly that."""
    match = _FORM.fullmatch(described)
    if not match or match[1] not in DTYPE_BITS:
        raise ValueError(described)
    shape = tuple(map(int, match[2].split(","))) if match[2] else ()
    size, rest = divmod(prod(shape) * DTYPE_BITS[match[1]], 8)
    if rest:
        raise ValueError(described)
    return Form(match[1], shape, size)


def _parsed(path: Path, raw: bytes, size: int) -> tuple[Header, dict[str, Any]]:
    """Parse any header, with a check of every field. Raises StorageError as `read_header` does."""
    header = parse_object(raw, f"the header of {path}", DOWNLOAD_AGAIN)
    metadata = header.pop("__metadata__", None)
    tensors = [_tensor(path, 8 + len(raw), name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(path, tensors, 8 + len(raw), size)
    columns = Header(
        path,
        [tensor.name for tensor in tensors],
        [Form(tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors],
        [tensor.offset for tensor in tensors],
    )
    return columns, metadata if isinstance(metadata, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, start: int, name: str, entry: Any) -> StoredTensor:
    def bad(what: str) -> StorageError:
        return StorageError(f"{path}: tensor {name[:200]!r} {what}. {DOWNLOAD_AGAIN}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("must be described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise StorageError(
            f"{path}: tensor {name[:200]!r} has the dtype {str(dtype)[:40]!r}, which is not a known safetensors dtype "
            f"({', '.join(DTYPE_BITS)}). Update lmeval-ext if the format has a new one."
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise bad(f"has a shape that is not a list of at most {MAX_DIMENSIONS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad("has data_offsets that are not two positions")
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise bad(f"spans {end - begin} bytes, but {dtype} x {shape} takes {bits / 8:g}")
    return StoredTensor(name, dtype, tuple(shape), end - begin, path, start + begin)


def _check_cover(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise StorageError(f"{path}: tensor {tensor.name[:200]!r} {what}. {DOWNLOAD_AGAIN}")
        position += tensor.nbytes
    if position != size:
        kind = "truncated" if position > size else "longer than its tensors"
        raise StorageError(
            f"{path} is {kind}: its tensors end at byte {position:,}, the file at {size:,}. {DOWNLOAD_AGAIN}"
        )
