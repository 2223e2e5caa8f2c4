"""A few hundred damaged files for each of our own readers; `run.py` tries 100,000."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.readers import READERS, Reader, Unsound, check_message
from tests.fuzz.run import main

EXAMPLES = {"result": 60, "spec": 80}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_damaged_files_are_read_or_refused_in_one_line(
    reader: Reader, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    examples = EXAMPLES.get(reader.name, 150) // (3 if request.config.getoption("--fast") else 1)
    reader.prepare(tmp_path, Random(0))
    reader.read(tmp_path)  # imports: they are not a case's time

    @settings(
        max_examples=examples, deadline=5000, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    @given(random=st.randoms(use_true_random=False))
    def one(random: Random) -> None:
        reader.prepare(tmp_path, random)
        reader.read(tmp_path)

    one()


@pytest.mark.parametrize("message", ["a\nb file", "no name", "file" + "x" * 9999])
def test_message_of_several_lines_or_without_the_file_is_a_failure(message: str) -> None:
    with pytest.raises(Unsound):
        check_message(message, "file")


def test_runner_counts_and_keeps_failures(tmp_path: Path, monkeypatch, capfd) -> None:
    """The reader fails in each case, with an exception or by taking too much memory."""

    def broken(folder: Path) -> None:
        data = (folder / "compare_run.json").read_bytes()
        if len(data) % 2:
            raise KeyError("x")
        bytearray(2**40)

    monkeypatch.setitem(READERS, "broken", Reader("broken", READERS["labels"].make, broken))
    monkeypatch.setattr("sys.argv", ["run.py", "broken", "--cases", "120", "--keep", str(tmp_path / "kept")])
    assert main() == 1
    printed = capfd.readouterr().out
    assert "120 failures" in printed
    assert "KeyError at test_fuzz.py" in printed
    assert "MemoryError at test_fuzz.py" in printed
    kept = sorted(folder.name for folder in (tmp_path / "kept").iterdir())
    assert len(kept) == 2
    assert "KeyError" in "".join((tmp_path / "kept" / name / "traceback.txt").read_text() for name in kept)


def test_runner_stops_a_reader_that_hangs(tmp_path: Path, monkeypatch, capfd) -> None:
    def hangs(folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.run._WARM_UP", 0)
    monkeypatch.setitem(READERS, "hangs", Reader("hangs", READERS["labels"].make, hangs))
    monkeypatch.setattr("sys.argv", ["run.py", "hangs", "--cases", "1", "--seconds", "0.1"])
    assert main() == 1
    assert "TooSlow at test_fuzz.py" in capfd.readouterr().out


def test_same_seed_makes_the_same_case() -> None:
    for reader in READERS.values():
        assert reader.make(Random("1/x/7")) == reader.make(Random("1/x/7"))
