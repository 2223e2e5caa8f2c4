"""The two records that readers, grouping and accounting exchange."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

Role = Literal["layer", "head", "token_embedding", "embedding", "router", "vision", "draft", "other"]


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


@dataclass(frozen=True)
class Weight:
    """A logical weight: all the tensors that encode it, as one.

    bits: stored bits, side tensors included. elements: logical elements, None if unknown; then `problem` gives the
    reason. packing: name of the row of `packings.PACKINGS`, or the dtype of a dense tensor.
    """

    name: str
    role: Role
    bits: int
    elements: int | None
    packing: str
    problem: str | None = None
