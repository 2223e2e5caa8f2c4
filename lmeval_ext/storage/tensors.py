"""The two records that pass between the readers, the packing table and the accounting."""

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

    dtype: the file format's own name ("BF16", "F8_E4M3", "Q4_K"); shape: stored shape; offset: first byte in `path`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int

    @property
    def numel(self) -> int:
        """Stored elements (of the packed tensor, not of the weight it encodes)."""
        return prod(self.shape)

    def read(self, limit: int = 32) -> bytes:
        """The stored bytes of a tiny metadata tensor such as `weight_shape`; never more than `limit`."""
        if self.nbytes > limit:
            raise ValueError(f"{self.name} holds {self.nbytes} bytes, more than the {limit} of a shape")
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, self.nbytes, self.offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Weight:
    """A logical weight: every tensor that encodes it, taken together.

    bits: stored bits, with all side tensors. elements: logical elements, None if unknown, and then `problem` says
    why. packing: name of the row of the packing table, or the dtype of a dense tensor.
    """

    name: str
    role: Role
    bits: int
    elements: int | None
    packing: str
    problem: str | None = None
