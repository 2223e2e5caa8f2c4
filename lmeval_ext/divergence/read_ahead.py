"""Reads a store's windows ahead of the engine that needs them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from lmeval_ext.divergence.store import ReferenceStore, StoredWindow

_IN_MEMORY = 1 << 30


_IN_USE = 2  # windows that a step of an engine may still come back to


_READERS = 2  # ahead of any engine; more only take the interpreter's lock from it


class Windows(Mapping[str, StoredWindow]):
    """Windows of a store, each read and checked while those before it are looked at.

    Best asked for in the order given. Up to 1 GiB of them are in memory; those that were asked for longest ago make
    room for those to come, and are read again if they are wanted once more. Whoever asks for a window is told
    (UserError) of any damage that was found by then.
    """

    def __init__(self, store: ReferenceStore, keys: Iterable[str]) -> None:
        self._store, self._to_come = store, dict.fromkeys(keys)
        self._keys = tuple(self._to_come)
        self._held: dict[str, tuple[int, Future[StoredWindow]]] = {}  # bytes, window
        self._asked_for: dict[str, None] = {}  # of those held, the last one last
        self._damage: list[BaseException] = []
        self._alone: StoredWindow | None = None  # read when it was asked for
        self._room, self._pool = _IN_MEMORY, ThreadPoolExecutor(_READERS)
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._to_come:
            key = next(iter(self._to_come))
            path = self._store.path(key)
            size = path.stat().st_size if path.exists() else 0  # what is missing is told by who reads it
            # The last of all that are held is kept as long as the next ones are not looked at
            in_use = _IN_USE if len(self._held) > len(self._asked_for) else 1
            while self._room < size and len(self._asked_for) > in_use:
                oldest = next(iter(self._asked_for))
                del self._asked_for[oldest]
                self._room += self._held.pop(oldest)[0]
            if self._room < size:
                return
            del self._to_come[key]
            self._room -= size
            coming = self._pool.submit(self._store.read, key)
            coming.add_done_callback(functools.partial(_note, self._damage))
            self._held[key] = size, coming

    def close(self) -> None:
        """Read no more ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, key: str) -> StoredWindow:
        if self._damage:
            raise self._damage[0]
        if key in self._held:
            self._asked_for.pop(key, None)
            self._asked_for[key] = None
            found = self._held[key][1].result()
            self._read_ahead()
            return found
        if key not in self._keys:
            raise KeyError(key)
        if self._alone is None or self._alone.key != key:
            self._to_come.pop(key, None)
            self._alone = None  # room first
            self._alone = self._store.read(key)
        return self._alone

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _note(damage: list[BaseException], read: Future[StoredWindow]) -> None:
    # Of no `Windows`: futures keep their callbacks, and so what those belong to
    error = None if read.cancelled() else read.exception()
    if error is not None:
        damage.append(error)
