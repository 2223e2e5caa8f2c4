"""The records that readers, grouping and accounting exchange.

A mixture of experts has up to 300,000 tensors, so a file's tensors are kept as columns (`Header`): a `StoredTensor` is
made only for the tensor that is asked for, and tensors of one form share one `Form`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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


class Run:
    """Tensors that differ in their layer's number alone.

    stack: the numbered list that they are in ("model.layers"); None for a tensor outside any. rest: their name below
    the number (".mlp.up_proj.weight"), or the full name. form: dtype, shape and bytes of each. file, index: the place
    of the first, among the headers and in its header. numbers: the layers, in the order of the files; [""] outside any
    stack.
    """

    __slots__ = ("file", "form", "index", "numbers", "rest", "stack")

    def __init__(self, stack: str | None, rest: str, form: Form, index: int, file: int = 0) -> None:
        self.stack, self.rest, self.form, self.index, self.file = stack, rest, form, index, file
        self.numbers: list[str] = []


_NUMBERED = re.compile(r"(?:(.*?)\.)?([0-9]+)(\..+)", re.DOTALL)


def cut(name: str) -> tuple[str | None, str, str]:
    """Cut a name at its first number: ("model.layers", "3", ".mlp.up_proj.weight"), or (None, "", name)."""
    match = _NUMBERED.fullmatch(name)
    return (match[1] or "", match[2], match[3]) if match else (None, "", name)


def joined(stack: str | None, number: str, rest: str) -> str:
    """Return the name that `cut` has cut."""
    return rest if stack is None else f"{stack}.{number}{rest}" if stack else number + rest


class Header(Sequence[StoredTensor]):
    """The tensors of one file as columns of equal length.

    path: the file. names, forms: of the tensors, in the order of their data. offsets: positions of their first bytes,
    as a list, or the position of the first tensor if the others follow without holes. runs: the tensors by what they
    differ in, if the reader has collected them already.
    """

    def __init__(
        self, path: Path, names: list[str], forms: list[Form], offsets: list[int] | int, runs: list[Run] | None = None
    ) -> None:
        self.path, self.names, self.forms = path, names, forms
        self._offsets, self._runs = offsets, runs

    @property
    def offsets(self) -> list[int]:
        """Return the position of each tensor's first byte."""
        if isinstance(self._offsets, int):
            sizes = (form.nbytes for form in self.forms[:-1])
            self._offsets = list(accumulate(sizes, initial=self._offsets)) if self.forms else []
        return self._offsets

    @property
    def runs(self) -> list[Run]:
        """Return the tensors, collected by stack, name below the layer and form."""
        if self._runs is None:
            runs: dict[tuple[str | None, str, Form], Run] = {}
            for index, (name, form) in enumerate(zip(self.names, self.forms, strict=True)):
                stack, number, rest = cut(name)
                run = runs.setdefault((stack, rest, form), Run(stack, rest, form, index))
                run.numbers.append(number)
            self._runs = list(runs.values())
        return self._runs

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
    """All tensors of a checkpoint by name.

    headers: those of its files, whose names are all different. runs: of all headers, if the reader has collected them.
    """

    def __init__(self, headers: Sequence[Header], runs: list[Run] | None = None) -> None:
        self.headers = headers
        self._runs = runs
        self._places: dict[str, tuple[Header, int]] | None = None

    @property
    def runs(self) -> list[Run]:
        """Return the tensors, collected by stack, name below the layer and form; one may be there once per file."""
        if self._runs is None:
            self._runs = []
            for file, header in enumerate(self.headers):
                for run in header.runs:
                    run.file = file
                self._runs += header.runs
        return self._runs

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
    of the same name but for the numbers of layer and expert the record stands for; bits and elements are sums over
    them.
    """

    name: str
    role: Role
    bits: int
    elements: int | None
    packing: str
    problem: str | None = None
    copies: int = 1
