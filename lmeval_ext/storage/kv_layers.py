"""What the layers of a model keep for attention, before it is known in which types an engine stores it.

Readers: `kv_config` (config.json) and `kv_gguf` (GGUF metadata). `kv_cache` turns the record into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

SIXTEEN_BITS = "16 bits"  # the dtype of a cache that is kept in float16 or bfloat16


class UnknownCache(Exception):
    """The size of the cache cannot be known. The message gives the reason."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps.

    keys, values: elements per token, all KV heads together; a latent (MLA) counts as keys. window: tokens beyond which
    old ones are dropped, None if all are kept. indexer_bytes: bytes per token of the keys by which sparse attention
    chooses tokens, in a type of their own. conv, recurrent: elements of states that do not grow with the context.
    """

    keys: int = 0
    values: int = 0
    window: int | None = None
    indexer_bytes: int = 0
    conv: int = 0
    recurrent: int = 0


@dataclass(frozen=True)
class Layout:
    """What all layers of a model keep for one sequence.

    dtype: the type in which a cache without options is kept. conv_bytes, recurrent_bytes: per element of the states.
    doubt: why the record is an upper bound only, None if it is exact. note: a remark that does not touch the figure.
    """

    layers: tuple[LayerCache, ...]
    dtype: str
    conv_bytes: int
    recurrent_bytes: int
    doubt: str | None = None
    note: str | None = None
