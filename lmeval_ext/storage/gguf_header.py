"""The header of one GGUF file: metadata, then tensor names, dimensions, types and offsets.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because gguf's GGUFReader
makes several numpy views per token of the vocabulary (seconds for a large one) and trusts the counts in the file.
Arrays are skipped, but for short ones of numbers, which have one value per layer.

`FORMATS` has one row per scalar metadata type: its `struct` character. Tensor types and their block sizes come from
the gguf package's own table, so a new tensor type needs a newer gguf package and no change here.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lmeval_ext.storage.foreign_gguf import foreign_type
from lmeval_ext.storage.info import DOWNLOAD_AGAIN, StorageError, unreadable
from lmeval_ext.storage.rounding import round_up
from lmeval_ext.storage.tensors import StoredTensor

FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
NEWEST_TYPE = max(GGMLQuantizationType)
# Limits far above any real file: DeepSeek-V3 has 1,100 tensors, the largest vocabularies have 300,000 tokens.
MAX_KEYS, MAX_TENSORS, MAX_STRINGS, MAX_DIMENSIONS, MAX_NAME = 2**16, 2**20, 2**22, 4, 2**16
MAX_LIST = 1024  # longer arrays are not read; llama.cpp's LLAMA_MAX_LAYERS is 512


@dataclass
class GGUFHeader:
    """The parsed header of one GGUF file.

    metadata: scalar and string values by key. arrays: keys of all arrays. lists: the values of short arrays of numbers
    or booleans. tensors: in the order of the header.
    """

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: set[str] = field(default_factory=set)
    lists: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: list[StoredTensor] = field(default_factory=list)

    def integer(self, key: str) -> int | None:
        """Return a metadata integer, None if the key is absent or its value has another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_gguf(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises StorageError for a header that is truncated, inconsistent or beyond the limits above.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise StorageError(f"{path} does not start with the magic bytes of a GGUF file. Check the path.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderParser(path, data).header()
    except OSError as error:
        raise unreadable(path, error) from None
    except (struct.error, OverflowError):  # OverflowError: a position beyond 63 bits
        raise StorageError(
            f"{path} is truncated: its header continues past the end of the file. {DOWNLOAD_AGAIN}"
        ) from None
    except UnicodeDecodeError:
        raise StorageError(f"{path} has a name that is not UTF-8. {DOWNLOAD_AGAIN}") from None


class _HeaderParser:
    """Reads a GGUF header from `position` on. Raises struct.error for a read past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4
        (version,) = struct.unpack_from("<I", data, 4)
        # In a big-endian file, the low half of the version is 0 when read as little-endian.
        self.order = ">" if version & 0xFFFF == 0 else "<"
        version = self.take("I")
        if version not in (2, 3):
            raise self.bad(f"is GGUF version {version}, expected 2 or 3")

    def bad(self, what: str) -> StorageError:
        """Return the error for a damaged header."""
        return StorageError(f"{self.path} {what}. {DOWNLOAD_AGAIN}")

    def take(self, kind: str) -> Any:
        """Read one number; kind: its `struct` character."""
        (value,) = struct.unpack_from(self.order + kind, self.data, self.position)
        self.position += struct.calcsize(self.order + kind)
        return value

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise struct.error

    def text(self, limit: int) -> str:
        """Read a string of at most `limit` bytes."""
        length = self.take("Q")
        if length > limit:
            raise self.bad(f"has a string of {length:,} bytes where at most {limit:,} are expected")
        start = self.position
        self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def kind(self) -> GGUFValueType:
        """Read the type of a metadata value."""
        number = self.take("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.bad(f"has a metadata value of the unknown type {number}") from None

    def count(self, what: str, limit: int) -> int:
        """Read the count of `what`. Raises StorageError above `limit`, before anything is read in a loop."""
        number = int(self.take("Q"))
        if number > limit:
            raise self.bad(f"announces {number:,} {what}, more than {limit:,}")
        return number

    def header(self) -> GGUFHeader:
        """Read the counts, the metadata and the tensor entries, and check them."""
        header = GGUFHeader(self.path)
        tensors, keys = self.count("tensors", MAX_TENSORS), self.count("metadata keys", MAX_KEYS)
        seen: set[str] = set()
        for _ in range(keys):
            key = self.text(MAX_NAME)
            if key in seen:
                raise self.bad(f"has the metadata key {key[:80]!r} twice")
            seen.add(key)
            if struct.unpack_from(self.order + "I", self.data, self.position)[0] == GGUFValueType.ARRAY:
                header.arrays.add(key)
            value = self.value()
            if isinstance(value, tuple):
                header.lists[key] = value
            elif value is not None:
                header.metadata[key] = value
        entries = [self.entry() for _ in range(tensors)]
        alignment = header.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 2**30:
            raise self.bad(f"has the alignment {alignment!r}, expected a power of two")
        start = round_up(self.position, alignment)
        header.tensors = [
            StoredTensor(name, kind, shape, size, self.path, start + offset)
            for name, kind, shape, size, offset in entries
        ]
        self.check(header.tensors)
        return header

    def value(self) -> Any:
        """Read one metadata value, a short array of numbers as a tuple.

        Returns None for other arrays and for long strings, which are skipped.
        """
        kind = self.kind()
        if kind == GGUFValueType.STRING:
            length = struct.unpack_from(self.order + "Q", self.data, self.position)[0]
            if length > MAX_NAME:  # chat templates and licences: never needed here
                self.skip(8 + length)
                return None
            return self.text(MAX_NAME)
        if kind != GGUFValueType.ARRAY:
            return self.take(FORMATS[kind])
        item = self.kind()
        if item == GGUFValueType.ARRAY:
            raise self.bad("has an array of arrays in its metadata")
        if item == GGUFValueType.STRING:
            self.skip_strings(self.count("strings in an array", MAX_STRINGS))
            return None
        count, start = self.take("Q"), self.position
        self.skip(count * struct.calcsize(self.order + FORMATS[item]))
        return (
            struct.unpack_from(f"{self.order}{count}{FORMATS[item]}", self.data, start) if count <= MAX_LIST else None
        )

    def skip_strings(self, count: int) -> None:
        unpack, data, position = struct.Struct(self.order + "Q").unpack_from, self.data, self.position
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
        self.position = position
        self.skip(0)

    def entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Read one tensor entry: name, type, shape (outermost first), bytes, offset in the data section."""
        name, dimensions = self.text(MAX_NAME), self.take("I")
        if dimensions > MAX_DIMENSIONS:
            raise self.bad(f"has the tensor {name[:80]!r} with {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        sizes = tuple(self.take("Q") for _ in range(dimensions))
        number, offset = self.take("I"), self.take("Q")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise StorageError(
                f"{self.path}: tensor {name[:80]!r} has the type {number}, {foreign_type(number, NEWEST_TYPE)}"
            ) from None
        if sizes and sizes[0] % block:
            raise self.bad(f"has the tensor {name[:80]!r} with rows of {sizes[0]} values, not whole blocks of {block}")
        return name, kind.name, sizes[::-1], prod(sizes) // block * block_bytes, offset

    def check(self, tensors: list[StoredTensor]) -> None:
        """Raise StorageError for equal names, overlapping tensors, and tensors beyond the end of the file."""
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self.bad("has two tensors of the same name")
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset < end:
                raise self.bad(f"has the tensor {tensor.name[:80]!r}, which overlaps the one before it")
            end = tensor.offset + tensor.nbytes
        if end > len(self.data):
            raise self.bad(f"is truncated: its tensors end at byte {end:,}, the file at {len(self.data):,}")
