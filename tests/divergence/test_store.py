"""A reference on disk: whole or not at all, damage is seen, and nothing of two models gets mixed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import json
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeval_ext.divergence import read_ahead
from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.read_ahead import Windows
from lmeval_ext.divergence.store import Manifest, ReferenceStore, StoredWindow
from lmeval_ext.divergence.store_files import tensors_sha256
from lmeval_ext.errors import UserError
from lmeval_ext.requests import window_key
from tests.divergence.stores import equal, made, manifest, same, some_head, window

MODES = ["hidden", "logits"]


def parts(store: ReferenceStore) -> dict[str, Path]:
    return {
        "manifest": store.folder / "reference.json",
        "head": store.folder / "head.safetensors",
        "window": store.path(window(0).key),
    }


def read_part(folder: Path, part: str) -> Any:
    """What a comparison reads of it, in a form that can be compared."""
    store = ReferenceStore.open(folder)
    if part == "manifest":
        return store.manifest
    if part == "head":
        head = store.head()
        return head.weight.tolist(), head.bias.tolist(), head.softcap, head.scale  # type: ignore[union-attr]
    found = store.read(window(0).key)
    return {name: t.tolist() for name, t in (found.states | found.scores).items()}


# ---------------------------------------------------------------------- what was written comes back


@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode: str, tmp_path: Path) -> None:
    made(tmp_path, 3, mode)
    store = ReferenceStore.open(str(tmp_path))
    assert store.manifest == manifest(mode)
    assert len(store) == 3
    for number in range(3):
        assert same(store.read(window(number).key), window(number, mode=mode))
        assert torch.equal(store.own_kld(window(number).key), window(number).scores["kld"])
        assert window(number).key in store
    assert window(3).key not in store
    if mode == "hidden":
        head, expected = store.head(), some_head()
        assert equal({"w": head.weight, "b": head.bias}, {"w": expected.weight, "b": expected.bias})  # type: ignore[dict-item]
        assert (head.softcap, head.scale) == (expected.softcap, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    store = made(tmp_path)
    found = window(7)
    found.states["hidden"] = torch.randn(4, 3).to(dtype).t()  # columns first in memory
    store.write(found)
    assert same(store.read(found.key), found)


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    """They are written under another name first, which only their owner may read."""
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in parts(made(tmp_path / "store")).values():
        assert path.stat().st_mode == plain.stat().st_mode


ids = st.lists(st.integers(0, 300_000), min_size=2, max_size=20)


@given(ids, ids, st.integers(1, 19), st.integers(1, 19))
def test_a_window_is_known_by_its_tokens_and_what_is_scored(a: list[int], b: list[int], m: int, n: int) -> None:
    assert (window_key(a, m) == window_key(b, n)) == ((a, m) == (b, n))
    assert len(window_key(a, m)) == 32
    assert window_key(a, m) == window_key(list(a), m)
    assert window_key(a, m) != window_key([m, *a], 1)  # where the ids begin is no matter of taste


def test_a_key_that_stays_what_it_is() -> None:
    """SHA-256 of the little-endian 64-bit numbers 2, 5, 6, 7: stores outlive releases."""
    import hashlib
    import struct

    assert window_key([5, 6, 7], 2) == hashlib.sha256(struct.pack("<4q", 2, 5, 6, 7)).hexdigest()[:32]


def test_a_sum_that_stays_what_it_is() -> None:
    """By the definition in words: SHA-256 over name, dtype and shape, and then the SHA-256 of every 16 MiB."""
    import hashlib

    tensor = torch.arange(10 << 20, dtype=torch.int32).view(-1, 2)
    data = tensor.numpy().tobytes()
    pieces = [data[: 16 << 20], data[16 << 20 : 32 << 20], data[32 << 20 :]]
    expected = hashlib.sha256(b"a I32 [5242880, 2] ")
    for piece in pieces:
        expected.update(hashlib.sha256(piece).digest())
    expected.update(b"b F16 [0] ")
    assert tensors_sha256({"b": torch.empty(0, dtype=torch.float16), "a": tensor}) == expected.hexdigest()


# ---------------------------------------------------------------------- whole or not at all


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing and renaming; no half files are left over, under any name."""
    store = made(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            changed, fresh = dataclasses.replace(window(9), key=window(0).key), window(1)
            for new in (changed, fresh):
                with pytest.raises(KeyboardInterrupt):
                    store.write(new)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, name
    assert len(store) == 1
    assert same(store.read(window(0).key), window(0))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"save_reference=.*: cannot be written to \(No space left on device\)"):
        store.write(window(1))
    with pytest.raises(UserError, match="No space left on device"):
        ReferenceStore.create(tmp_path / "other", manifest())


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save_reference=.*file: cannot be written to"):
        ReferenceStore.create(tmp_path / "file", manifest())


def test_writers_of_the_same_window(tmp_path: Path) -> None:
    """Two runs, or ranks that share windows: whoever is last, the file is whole, and readers never see less."""
    store, failures = made(tmp_path, 1), list[BaseException]()
    key, stop = window(0).key, threading.Event()
    versions = [dataclasses.replace(window(n), key=key) for n in range(4)]

    def guarded(work: Any) -> threading.Thread:
        def target() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=target)

    def reads() -> None:
        while not stop.is_set():
            found = store.read(key)
            assert any(same(found, v) for v in versions)

    writers = [guarded(lambda v=v: [store.write(v) for _ in range(25)]) for v in versions]
    reader = guarded(reads)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not failures
    assert any(same(store.read(key), v) for v in versions)
    assert [p.name for p in (tmp_path / "windows").iterdir()] == [f"{key}.safetensors"]


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ReferenceStore:
    return made(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("part", ["window", "head", "manifest"])
def test_a_changed_byte_anywhere_is_seen(part: str, sound: ReferenceStore, tmp_path_factory: Any) -> None:
    """Every byte of the file, some of its bits. What is let through has lost nothing: white space of JSON."""
    whole = parts(sound)[part].read_bytes()
    expected = read_part(sound.folder, part)
    folder = tmp_path_factory.mktemp("damaged")
    store = made(folder)
    path, seen = parts(store)[part], list[str]()

    @settings(max_examples=400, deadline=None)
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def check(at: int, change: int) -> None:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        try:
            found = read_part(folder, part)
        except UserError as error:
            seen.append(str(error))
        else:
            assert found == expected
            assert whole[at : at + 1].isspace()

    check()
    assert len(seen) > 100
    assert all(str(path) in words and "\n" not in words for words in seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_head_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    head = OutputHead(torch.randn(7, 4).to(dtype))
    store = ReferenceStore.create(tmp_path, manifest(head=head))
    store.write_head(head)
    assert torch.equal(store.head().weight, head.weight)


@pytest.mark.parametrize("dtype", [b"U32", b"I32", b"X32", b"F16"])
def test_a_head_that_says_another_dtype_is_damaged(dtype: bytes, tmp_path: Path) -> None:
    """One of those that no store has, too."""
    store = made(tmp_path)
    whole = store.head_path.read_bytes()
    assert b'"F32"' in whole
    store.head_path.write_bytes(whole.replace(b"F32", dtype))
    with pytest.raises(UserError, match=r"head\.safetensors: the stored reference is damaged"):
        store.head()
    assert not store.has_sound_head()


@pytest.mark.parametrize("part", ["window", "head", "manifest"])
def test_a_truncated_file_is_seen(part: str, tmp_path: Path) -> None:
    path = parts(made(tmp_path))[part]
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged") as caught:
            read_part(tmp_path, part)
        assert str(path) in str(caught.value)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="damaged"):
        read_part(tmp_path, part)


def test_missing_parts(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(UserError, match=r"no reference\.json there; give a folder that a run with save_reference="):
        ReferenceStore.open(tmp_path / "nowhere")
    (tmp_path / "head.safetensors").unlink()
    assert not store.has_sound_head()
    with pytest.raises(UserError, match=r"head\.safetensors: the stored reference is damaged \(it is missing\)"):
        store.head()
    store.path(window(1).key).unlink()
    with pytest.raises(UserError, match="it is missing"):
        store.read(window(1).key)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_versions_are_refused(version: Any, tmp_path: Path) -> None:
    path = parts(made(tmp_path))["manifest"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(
        UserError, match=r"reference\.json: version .* this release reads version 2: delete that folder, or"
    ):
        ReferenceStore.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", '"text"', "{not json", '{"format": "another"}', "\xff"])
def test_files_of_another_kind_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"reference\.json: the stored reference is damaged"):
        ReferenceStore.open(tmp_path)


def test_a_window_under_anothers_name(tmp_path: Path) -> None:
    """Whole, but not what its name says; or of another reference."""
    store = made(tmp_path / "a", 2)
    store.path(window(0).key).write_bytes(store.path(window(1).key).read_bytes())
    with pytest.raises(UserError, match="it belongs to another window or another reference"):
        store.read(window(0).key)
    other = ReferenceStore.create(tmp_path / "b", manifest(dtype="bfloat16"))
    other.write(window(1))
    store.path(window(1).key).write_bytes(other.path(window(1).key).read_bytes())
    with pytest.raises(UserError, match="it belongs to another window or another reference"):
        store.read(window(1).key)


def test_anothers_head(tmp_path: Path) -> None:
    store = made(tmp_path)
    store.write_head(some_head(seed=5))
    with pytest.raises(UserError, match=r"head\.safetensors: .*its contents are not what reference\.json says"):
        store.head()


# ---------------------------------------------------------------------- one folder, one model


@pytest.mark.parametrize(
    "other",
    [
        manifest(label="second", weights_sha256="cd"),
        manifest(label="second", engine="vllm"),
        manifest(label="second", dtype="bfloat16"),
        manifest("logits", label="second"),
        manifest(head=some_head(seed=3), label="second"),
        dataclasses.replace(manifest(label="second"), tokenizer_probe=[1, 2, 4]),
        dataclasses.replace(manifest(label="second"), softcap=None),
    ],
)
def test_another_model_is_refused_with_both_names(other: Manifest, tmp_path: Path) -> None:
    made(tmp_path)
    before = (tmp_path / "reference.json").read_bytes()
    with pytest.raises(UserError, match="name another folder") as caught:
        ReferenceStore.create(tmp_path, other)
    assert "first (tiny 1, float32)" in str(caught.value)
    assert "second" in str(caught.value)
    assert (tmp_path / "reference.json").read_bytes() == before


def test_a_label_is_a_mere_name(tmp_path: Path) -> None:
    made(tmp_path, 1)
    again = ReferenceStore.create(tmp_path, manifest(label="second"))
    assert again.manifest.model["label"] == "first"
    assert same(again.read(window(0).key), window(0))


# ---------------------------------------------------------------------- many windows


class Reading:
    """Counts what is read of a store."""

    def __init__(self, store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys = list[str]()
        original = store.read

        def read(key: str) -> StoredWindow:
            self.keys.append(key)
            return original(key)

        monkeypatch.setattr(store, "read", read)


def held(windows: Windows) -> int:
    """How many are in memory, or on their way there."""
    concurrent.futures.wait([coming for _, coming in windows._held.values()])
    return len(windows._held)


def test_windows_beyond_the_memory_make_room_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for four of nine. In the order given, and twice in a row, each is read once."""
    store = made(tmp_path, 9)
    keys = [window(n).key for n in range(9)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 4 * store.path(keys[0]).stat().st_size + 1)
    reading = Reading(store, monkeypatch)
    found = Windows(store, [*keys, keys[0]])
    assert list(found) == keys
    assert len(found) == 9
    for n in (0, 1, 0, 1, 1, 2, 2, 3, 4, 3, 5, 6, 7, 8):
        assert same(found[keys[n]], window(n))
        assert held(found) == 4
    assert sorted(reading.keys) == sorted(keys)
    with pytest.raises(KeyError):
        found["another"]


def test_windows_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it is, whatever was asked for before; what is not in memory is read when it is asked for."""
    store = made(tmp_path, 9)
    keys = [window(n).key for n in range(9)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 4 * store.path(keys[0]).stat().st_size)
    reading = Reading(store, monkeypatch)
    found = Windows(store, keys)
    assert held(found) == 4
    for n in (8, 8, 2, 8, 0, 3, 1, 7, 8, 0, 4, 5, 6, 4):
        assert same(found[keys[n]], window(n))
        assert held(found) <= 4
    assert reading.keys.count(keys[8]) == 2  # once for its first three turns, once for its last


@pytest.mark.parametrize("room", [2, 3])
def test_one_window_ahead_where_there_is_room_for_few(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path, 6)
    keys = [window(n).key for n in range(6)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", room * store.path(keys[0]).stat().st_size)
    reading = Reading(store, monkeypatch)
    found = Windows(store, keys)
    for n, key in enumerate(keys):
        assert same(found[key], window(n))
        assert found._alone is None
        assert held(found) <= room
    assert reading.keys == keys


def test_windows_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 0)
    store = made(tmp_path, 3)
    reading = Reading(store, monkeypatch)
    found = Windows(store, [window(n).key for n in range(3)])
    for n in (0, 0, 1, 2, 2, 0):
        assert same(found[window(n).key], window(n))
    assert reading.keys == [window(n).key for n in (0, 1, 2, 0)]


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_damage_is_told_to_whoever_asks_next(tmp_path: Path, harm: str) -> None:
    """Of any window: a run of minutes need not come to the damaged one first."""
    store = made(tmp_path, 3)
    path = store.path(window(2).key)
    whole = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(whole[:-1])
    found = Windows(store, [window(n).key for n in range(3)])
    assert held(found) == 3
    found._pool.shutdown(wait=True)  # a window is there a moment before its damage is noted
    with pytest.raises(UserError, match=path.name):
        found[window(0).key]
    path.write_bytes(whole)
    assert same(Windows(store, [window(0).key])[window(0).key], window(0))


def test_the_first_windows_are_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By later ones, whose reading takes until the first was looked at."""
    store, seen = made(tmp_path, 3), threading.Event()
    keys = [window(n).key for n in range(3)]
    original = store.read

    def read(key: str) -> StoredWindow:
        if key != keys[0]:
            assert seen.wait(60)
        return original(key)

    monkeypatch.setattr(store, "read", read)
    found = Windows(store, keys)
    assert same(found[keys[0]], window(0))
    seen.set()
    assert all(same(found[key], window(n)) for n, key in enumerate(keys))


def test_nothing_is_read_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that stopped early; and what was read is forgotten with the windows."""
    store, begun, go = made(tmp_path, 5), threading.Event(), threading.Event()
    reading, keys = Reading(store, monkeypatch), [window(n).key for n in range(5)]
    counted = store.read

    def read(key: str) -> StoredWindow:
        begun.set()
        assert go.wait(60)
        return counted(key)

    monkeypatch.setattr(store, "read", read)
    monkeypatch.setattr(read_ahead, "_READERS", 1)
    found = Windows(store, keys)
    assert begun.wait(60)
    found.close()
    go.set()
    found._pool.shutdown(wait=True)
    assert reading.keys == keys[:1]
    gone = weakref.ref(found)
    gc.disable()
    try:
        del found
        assert gone() is None  # by counting references: no cycle keeps a gigabyte until the next collection
    finally:
        gc.enable()


def test_damage_done_in_between_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 0)
    store = made(tmp_path, 1)
    found = Windows(store, [window(0).key])
    path = store.path(window(0).key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum is wrong"):
        found[window(0).key]
