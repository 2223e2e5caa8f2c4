"""Reads a store's windows before the engine needs them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from lmeval_ext.divergence.store import ReferenceStore, StoredWindow

_IN_MEMORY = 1 << 30  # bytes
_IN_USE = 2  # windows that a step of an engine may still need
_READERS = 2  # enough to stay ahead of any engine; more only compete with it for the interpreter's lock


class Windows(Mapping[str, StoredWindow]):
    """Windows of a store by key, each read and checked while the windows before it are in use.

    Fastest when accessed in the given order. Up to 1 GiB of them are in memory; the least recently used make room for
    those to come, and are read again if needed. Raises UserError once any read has failed.
    """

    def __init__(self, store: ReferenceStore, keys: Iterable[str]) -> None:
        self._store, self._to_read = store, dict.fromkeys(keys)
        self._keys = tuple(self._to_read)
        self._held: dict[str, tuple[int, Future[StoredWindow]]] = {}  # bytes, window
        self._used: dict[str, None] = {}  # keys of `_held` that were accessed, the most recent one last
        self._errors: list[BaseException] = []
        self._single: StoredWindow | None = None  # the last window that was read on access
        self._free, self._pool = _IN_MEMORY, ThreadPoolExecutor(_READERS)
        self._read_ahead()

    def __getitem__(self, key: str) -> StoredWindow:
        if self._errors:
            raise self._errors[0]
        if key in self._held:
            self._used.pop(key, None)
            self._used[key] = None
            window = self._held[key][1].result()
            self._read_ahead()
            return window
        if key not in self._keys:
            raise KeyError(key)
        if self._single is None or self._single.key != key:
            self._to_read.pop(key, None)
            self._single = None  # free its memory first
            self._single = self._store.read(key)
        return self._single

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        while self._to_read:
            key = next(iter(self._to_read))
            path = self._store.path(key)
            size = path.stat().st_size if path.exists() else 0  # `store.read` reports a missing file
            # Never evict a window still in use: two of them, or one if all held windows were accessed
            in_use = _IN_USE if len(self._held) > len(self._used) else 1
            while self._free < size and len(self._used) > in_use:
                oldest = next(iter(self._used))
                del self._used[oldest]
                self._free += self._held.pop(oldest)[0]
            if self._free < size:
                return
            del self._to_read[key]
            self._free -= size
            read = self._pool.submit(self._store.read, key)
            read.add_done_callback(functools.partial(_note_error, self._errors))
            self._held[key] = size, read


def _note_error(errors: list[BaseException], read: Future[StoredWindow]) -> None:
    # Not a method: a future keeps its callbacks, and with a method all windows, in memory
    error = None if read.cancelled() else read.exception()
    if error is not None:
        errors.append(error)
