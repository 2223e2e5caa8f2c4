"""The records that readers, grouping and accounting exchange.

A mixture of experts has up to 300,000 tensors, so a file's tensors are kept as columns (`Header`): a `StoredTensor` is
made only for the tensor that is asked for, and tensors of one form share one `Form`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple, overload

Role = Literal["layer", "head", "token_embedding", "embedding", "router", "vision", "draft", "other", "unknown"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file header describes it.

    dtype: the file format's own name ("BF16", "F8_E4M3", "Q4_K"). shape: stored shape. nbytes: stored bytes. offset:
    position of the first byte in the file `path`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int

    @property
    def numel(self) -> int:
        """Return the stored elements (of the packed tensor, not of the weight that it encodes)."""
        return prod(self.shape)

    def read(self, limit: int = 32) -> bytes:
        """Return the stored bytes of a tiny metadata tensor such as `weight_shape`.

        Raises ValueError for a tensor of more than `limit` bytes, OSError where the file cannot be read.
        """
        if self.nbytes > limit:
            raise ValueError(f"{self.name} holds {self.nbytes} bytes, more than the {limit} of a shape")
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, self.nbytes, self.offset)
        finally:
            os.close(descriptor)


class Form(NamedTuple):
    """What tensors of equal shape have in common: the file format's dtype, the stored shape, the stored bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header(Sequence[StoredTensor]):
    """The tensors of one file as columns of equal length: names, forms, and positions of the first byte in `path`."""

    path: Path
    names: list[str]
    forms: list[Form]
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> StoredTensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[StoredTensor]: ...

    def __getitem__(self, index: int | slice) -> StoredTensor | list[StoredTensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        dtype, shape, nbytes = self.forms[index]
        return StoredTensor(self.names[index], dtype, shape, nbytes, self.path, self.offsets[index])


class TensorTable(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint by name. headers: those of its files, whose names are all different."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self.headers = headers
        self._places: dict[str, tuple[Header, int]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.headers))

    def __iter__(self) -> Iterator[str]:
        return (name for header in self.headers for name in header.names)

    def __getitem__(self, name: str) -> StoredTensor:
        if self._places is None:
            self._places = {name: (file, index) for file in self.headers for index, name in enumerate(file.names)}
        header, index = self._places[name]
        return header[index]


@dataclass(frozen=True)
class Weight:
    """A logical weight: all the tensors that encode it, as one.

    bits: stored bits, side tensors included. elements: logical elements, None if unknown; then `problem` gives the
    reason. packing: name of the row of `packings.PACKINGS`, or the dtype of a dense tensor. copies: how many weights
    of the same name but for the layer's number the record stands for; bits and elements are the sums over them.
    """

    name: str
    role: Role
    bits: int
    elements: int | None
    packing: str
    problem: str | None = None
    copies: int = 1
