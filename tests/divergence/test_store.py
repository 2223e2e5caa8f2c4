"""References on disk: parts are written atomically, damage is detected, and two models are never mixed."""

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
from tests.fast_guard import examples

MODES = ["hidden", "logits"]


def parts(store: ReferenceStore) -> dict[str, Path]:
    return {
        "manifest": store.folder / "reference.json",
        "head": store.folder / "head.safetensors",
        "window": store.path(window(0).key),
    }


def read_part(folder: Path, part: str) -> Any:
    """A part as a comparison reads it, in a form that can be compared."""
    store = ReferenceStore.open(folder)
    if part == "manifest":
        return store.manifest
    if part == "head":
        head = store.head()
        return head.weight.tolist(), head.bias.tolist(), head.softcap, head.scale  # type: ignore[union-attr]
    stored = store.read(window(0).key)
    return {name: t.tolist() for name, t in (stored.states | stored.scores).items()}


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("mode", MODES)
def test_store_reads_back_what_was_written(mode: str, tmp_path: Path) -> None:
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
    written = window(7)
    written.states["hidden"] = torch.randn(4, 3).to(dtype).t()  # columns first in memory
    store.write(written)
    assert same(store.read(written.key), written)


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    """Although they are written under another name first."""
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in parts(made(tmp_path / "store")).values():
        assert path.stat().st_mode == plain.stat().st_mode


lists_of_ids = st.lists(st.integers(0, 300_000), min_size=2, max_size=20)


@given(lists_of_ids, lists_of_ids, st.integers(1, 19), st.integers(1, 19))
def test_window_key_depends_on_ids_and_first_target(a: list[int], b: list[int], m: int, n: int) -> None:
    assert (window_key(a, m) == window_key(b, n)) == ((a, m) == (b, n))
    assert len(window_key(a, m)) == 32
    assert window_key(a, m) == window_key(list(a), m)
    assert window_key(a, m) != window_key([m, *a], 1)  # the count is not just another id


def test_window_key_never_changes() -> None:
    """It is the SHA-256 of the little-endian 64-bit numbers 2, 5, 6, 7; stores must stay readable in later releases."""
    import hashlib
    import struct

    assert window_key([5, 6, 7], 2) == hashlib.sha256(struct.pack("<4q", 2, 5, 6, 7)).hexdigest()[:32]


def test_checksum_never_changes() -> None:
    """It is the SHA-256 over name, dtype and shape, and then the SHA-256 of every 16 MiB."""
    import hashlib

    tensor = torch.arange(10 << 20, dtype=torch.int32).view(-1, 2)
    data = tensor.numpy().tobytes()
    pieces = [data[: 16 << 20], data[16 << 20 : 32 << 20], data[32 << 20 :]]
    expected = hashlib.sha256(b"a I32 [5242880, 2] ")
    for piece in pieces:
        expected.update(hashlib.sha256(piece).digest())
    expected.update(b"b F16 [0] ")
    assert tensors_sha256({"b": torch.empty(0, dtype=torch.float16), "a": tensor}) == expected.hexdigest()


# ---------------------------------------------------------------------- atomic writes


def test_interrupted_write_leaves_the_store_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between writing and renaming; no partial files remain under any name."""
    store = made(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            changed, added = dataclasses.replace(window(9), key=window(0).key), window(1)
            for new in (changed, added):
                with pytest.raises(KeyboardInterrupt):
                    store.write(new)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, name
    assert len(store) == 1
    assert same(store.read(window(0).key), window(0))


def test_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"save_reference=.*: cannot be written to \(No space left on device\)"):
        store.write(window(1))
    with pytest.raises(UserError, match="No space left on device"):
        ReferenceStore.create(tmp_path / "other", manifest())


def test_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save_reference=.*file: cannot be written to"):
        ReferenceStore.create(tmp_path / "file", manifest())


def test_concurrent_writers_of_a_window_leave_it_complete(tmp_path: Path) -> None:
    """Runs or ranks may write the same window: whichever is last, the file is complete at any time."""
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
            stored = store.read(key)
            assert any(same(stored, v) for v in versions)

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
def test_changed_byte_anywhere_is_detected(part: str, sound: ReferenceStore, tmp_path_factory: Any) -> None:
    """Any byte of the file, some of its bits. Only changes to white space in JSON, which lose nothing, may pass."""
    content = parts(sound)[part].read_bytes()
    expected = read_part(sound.folder, part)
    folder = tmp_path_factory.mktemp("damaged")
    store = made(folder)
    path, messages = parts(store)[part], list[str]()

    @settings(max_examples=examples(400), deadline=None)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def check(index: int, change: int) -> None:
        path.write_bytes(content[:index] + bytes([content[index] ^ change]) + content[index + 1 :])
        try:
            value = read_part(folder, part)
        except UserError as error:
            messages.append(str(error))
        else:
            assert value == expected
            assert content[index : index + 1].isspace()

    check()
    assert len(messages) > examples(400) / 4
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_head_of_any_dtype_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    head = OutputHead(torch.randn(7, 4).to(dtype))
    store = ReferenceStore.create(tmp_path, manifest(head=head))
    store.write_head(head)
    assert torch.equal(store.head().weight, head.weight)


@pytest.mark.parametrize("dtype", [b"U32", b"I32", b"X32", b"F16"])
def test_head_with_a_changed_dtype_is_damaged(dtype: bytes, tmp_path: Path) -> None:
    """Also with a dtype that no store has."""
    store = made(tmp_path)
    content = store.head_path.read_bytes()
    assert b'"F32"' in content
    store.head_path.write_bytes(content.replace(b"F32", dtype))
    with pytest.raises(UserError, match=r"head\.safetensors: the stored reference is damaged"):
        store.head()
    assert not store.has_sound_head()


@pytest.mark.parametrize("part", ["window", "head", "manifest"])
def test_file_of_another_length_is_detected(part: str, tmp_path: Path) -> None:
    path = parts(made(tmp_path))[part]
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged") as caught:
            read_part(tmp_path, part)
        assert str(path) in str(caught.value)
    path.write_bytes(content + b"x")
    with pytest.raises(UserError, match="damaged"):
        read_part(tmp_path, part)


def test_missing_parts_are_user_errors(tmp_path: Path) -> None:
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


def test_window_under_the_name_of_another_is_damaged(tmp_path: Path) -> None:
    """The file is undamaged, but belongs to another key, or to another reference."""
    store = made(tmp_path / "a", 2)
    store.path(window(0).key).write_bytes(store.path(window(1).key).read_bytes())
    with pytest.raises(UserError, match="it belongs to another window or another reference"):
        store.read(window(0).key)
    other = ReferenceStore.create(tmp_path / "b", manifest(dtype="bfloat16"))
    other.write(window(1))
    store.path(window(1).key).write_bytes(other.path(window(1).key).read_bytes())
    with pytest.raises(UserError, match="it belongs to another window or another reference"):
        store.read(window(1).key)


def test_head_of_another_reference_is_damaged(tmp_path: Path) -> None:
    store = made(tmp_path)
    store.write_head(some_head(seed=5))
    with pytest.raises(UserError, match=r"head\.safetensors: .*its contents are not those named in reference\.json"):
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


def test_label_is_not_part_of_the_identity(tmp_path: Path) -> None:
    made(tmp_path, 1)
    again = ReferenceStore.create(tmp_path, manifest(label="second"))
    assert again.manifest.model["label"] == "first"
    assert same(again.read(window(0).key), window(0))


# ---------------------------------------------------------------------- many windows


class Reading:
    """Records the keys of the windows that are read."""

    def __init__(self, store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys = list[str]()
        original = store.read

        def read(key: str) -> StoredWindow:
            self.keys.append(key)
            return original(key)

        monkeypatch.setattr(store, "read", read)


def held(windows: Windows) -> int:
    """Number of windows in memory or being read."""
    concurrent.futures.wait([read for _, read in windows._held.values()])
    return len(windows._held)


def test_windows_beyond_the_memory_are_each_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is memory for four of nine, which are accessed in order, some twice in a row."""
    store = made(tmp_path, 9)
    keys = [window(n).key for n in range(9)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 4 * store.path(keys[0]).stat().st_size + 1)
    reading = Reading(store, monkeypatch)
    windows = Windows(store, [*keys, keys[0]])
    assert list(windows) == keys
    assert len(windows) == 9
    for n in (0, 1, 0, 1, 1, 2, 2, 3, 4, 3, 5, 6, 7, 8):
        assert same(windows[keys[n]], window(n))
        assert held(windows) == 4
    assert sorted(reading.keys) == sorted(keys)
    with pytest.raises(KeyError):
        windows["another"]


def test_windows_in_another_order_are_correct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is not in memory is read when it is accessed."""
    store = made(tmp_path, 9)
    keys = [window(n).key for n in range(9)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 4 * store.path(keys[0]).stat().st_size)
    reading = Reading(store, monkeypatch)
    windows = Windows(store, keys)
    assert held(windows) == 4
    for n in (8, 8, 2, 8, 0, 3, 1, 7, 8, 0, 4, 5, 6, 4):
        assert same(windows[keys[n]], window(n))
        assert held(windows) <= 4
    assert reading.keys.count(keys[8]) == 2  # once for its first three turns, once for its last


@pytest.mark.parametrize("room", [2, 3])
def test_one_window_is_read_ahead_with_memory_for_few(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path, 6)
    keys = [window(n).key for n in range(6)]
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", room * store.path(keys[0]).stat().st_size)
    reading = Reading(store, monkeypatch)
    windows = Windows(store, keys)
    for n, key in enumerate(keys):
        assert same(windows[key], window(n))
        assert windows._single is None
        assert held(windows) <= room
    assert reading.keys == keys


def test_windows_larger_than_the_memory_are_read_on_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 0)
    store = made(tmp_path, 3)
    reading = Reading(store, monkeypatch)
    windows = Windows(store, [window(n).key for n in range(3)])
    for n in (0, 0, 1, 2, 2, 0):
        assert same(windows[window(n).key], window(n))
    assert reading.keys == [window(n).key for n in (0, 1, 2, 0)]


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_failed_read_is_raised_at_the_next_access(tmp_path: Path, harm: str) -> None:
    """At the access to any window, so that a long run does not have to reach the damaged one first."""
    store = made(tmp_path, 3)
    path = store.path(window(2).key)
    content = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(content[:-1])
    windows = Windows(store, [window(n).key for n in range(3)])
    assert held(windows) == 3
    windows._pool.shutdown(wait=True)  # a read ends a moment before its error is noted
    with pytest.raises(UserError, match=path.name):
        windows[window(0).key]
    path.write_bytes(content)
    assert same(Windows(store, [window(0).key])[window(0).key], window(0))


def test_first_window_does_not_wait_for_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the later ones ends only after the first was accessed."""
    store, seen = made(tmp_path, 3), threading.Event()
    keys = [window(n).key for n in range(3)]
    original = store.read

    def read(key: str) -> StoredWindow:
        if key != keys[0]:
            assert seen.wait(60)
        return original(key)

    monkeypatch.setattr(store, "read", read)
    windows = Windows(store, keys)
    assert same(windows[keys[0]], window(0))
    seen.set()
    assert all(same(windows[key], window(n)) for n, key in enumerate(keys))


def test_close_stops_reading_and_frees_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run that stopped early."""
    store, begun, go = made(tmp_path, 5), threading.Event(), threading.Event()
    reading, keys = Reading(store, monkeypatch), [window(n).key for n in range(5)]
    counted = store.read

    def read(key: str) -> StoredWindow:
        begun.set()
        assert go.wait(60)
        return counted(key)

    monkeypatch.setattr(store, "read", read)
    monkeypatch.setattr(read_ahead, "_READERS", 1)
    windows = Windows(store, keys)
    assert begun.wait(60)
    windows.close()
    go.set()
    windows._pool.shutdown(wait=True)
    assert reading.keys == keys[:1]
    gone = weakref.ref(windows)
    gc.disable()
    try:
        del windows
        assert gone() is None  # no reference cycle keeps a gigabyte until the next collection
    finally:
        gc.enable()


def test_damage_after_the_start_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_IN_MEMORY", 0)
    store = made(tmp_path, 1)
    windows = Windows(store, [window(0).key])
    path = store.path(window(0).key)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum is wrong"):
        windows[window(0).key]
