"""Files appear complete or not at all, with the user's permissions; the same rules for both packages' writers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compare.files
import lmeval_ext.files

Writer = Callable[[Path, bytes], None]


@pytest.fixture(
    params=[lmeval_ext.files.write_atomically, compare.files.write_atomically], ids=["lmeval_ext", "compare"]
)
def write(request: pytest.FixtureRequest) -> Writer:
    writer: Writer = request.param
    return writer


@pytest.mark.parametrize(("umask", "permissions"), [(0o077, 0o600), (0o022, 0o644)])
def test_permissions_follow_the_umask(
    write: Writer, umask: int, permissions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to all threads of the process"))
            write(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == permissions


def test_a_file_is_replaced(write: Writer, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)  # as long as a name may be
    for content in (b"first", b"second"):
        write(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(
    write: Writer, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def fails(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(type(failure)):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_that_cannot_be_written_leaves_the_old_file(write: Writer, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(TypeError):
        write(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["folder/file", "a_file/file"])
def test_a_missing_folder_is_an_os_error(write: Writer, missing: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        write(tmp_path / missing, b"content")


def test_two_threads_writing_at_once_never_mix(write: Writer, tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([n]) * 100_000 for n in range(2)]
    write(path, contents[0])
    errors = list[BaseException]()

    def repeat(content: bytes) -> None:
        try:
            for _ in range(100):
                write(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


def test_data_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store outlives a crash of the machine: fsync comes before the rename."""
    calls = list[str]()
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, o=original, n=name, **k: (calls.append(n), o(*a, **k))[1])
    lmeval_ext.files.write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace"]
