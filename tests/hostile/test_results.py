"""Results that cannot be written to their folder; runs that are interrupted or share a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compare.results.reading import read_results
from lmeval_ext.errors import UserError
from lmeval_ext.output_guard import check_writable
from tests.conftest import run

METADATA = '{"eval_len": 64, "stride": 64, "max_rows": 5}'


def command(model: Path, out: Path, metadata: str = METADATA) -> list[str]:
    return ["run", "--model", "hf_quant", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu",
            "--tasks", "sample_strided", "--metadata", metadata, "--output_path", str(out)]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts `lm_eval ARGUMENTS` with its output in pipes."""
    program = Path(sys.executable).parent / "lm_eval"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two of them and the tests share the machine
    return subprocess.Popen(
        [str(program), *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
    )


@pytest.mark.parametrize("name", ["a/b/c", "a/results.json", "."])
def test_writable_output_paths_are_accepted(tmp_path: Path, name: str) -> None:
    check_writable(tmp_path / name)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "the check leaves no file"


@pytest.mark.parametrize("name", ["file", "file/below", "file/results.json", "x" * 300])
def test_output_paths_that_cannot_be_written_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"--output_path .*: cannot be written to \(.*\); name another folder"
    ) as caught:
        check_writable(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unwritable_output_path_ends_the_command_before_the_model_loads(tmp_path: Path) -> None:
    """The model does not exist, so loading it would fail otherwise."""
    (tmp_path / "file").write_text("x")
    done = run("lm_eval", *command(tmp_path / "absent", tmp_path / "file" / "out"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"lmeval-ext: error: --output_path {tmp_path}/file/out: cannot be")
    assert "Traceback" not in done.stderr


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness' own tracker, wrapped, with `output` as its folder; the working directory is `here`."""
    from lm_eval.loggers import EvaluationTracker

    from lmeval_ext.output_guard import guard

    guard()
    guard()  # a second call changes nothing
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = EvaluationTracker(output_path=str(tmp_path / "output"))
    made.general_config_tracker.model_name_sanitized = "model"
    return made


RESULTS = {"results": {"t": {"alias": "t", "acc,none": 0.5}}, "config": {"model": "hf"}, "date": 1.0}
SAMPLE = {"doc_id": 0, "arguments": [("a",)], "resps": [["x"]], "filtered_resps": ["x"], "target": "x",
          "doc_hash": "1", "prompt_hash": "2", "target_hash": "3"}  # fmt: skip


def save(tracker: Any) -> None:
    tracker.save_results_aggregated(results=dict(RESULTS), samples={"t": [dict(SAMPLE)]})
    tracker.save_results_samples("t", [dict(SAMPLE)])


def test_results_are_written_to_the_output_folder(tmp_path: Path, tracker: Any) -> None:
    save(tracker)
    assert sorted(file.suffix for file in (tmp_path / "output" / "model").iterdir()) == [".json", ".jsonl"]
    assert not list((tmp_path / "here").iterdir())


def test_results_are_kept_when_the_folder_disappears_during_the_run(
    tmp_path: Path, tracker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "output" / "model").write_text("in the way")
    save(tracker)
    kept = sorted((tmp_path / "here" / "lm_eval_results" / "model").iterdir())
    assert [file.suffix for file in kept] == [".json", ".jsonl"]
    assert json.loads(kept[0].read_text())["results"] == RESULTS["results"]
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("lmeval_ext")]
    assert str(tmp_path / "output") in message
    assert str(kept[0].relative_to(tmp_path / "here")) in message


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if path.is_relative_to(tmp_path / "output"):
            write_text(path, text[:20], *args, **kwargs)
            raise OSError(28, "No space left on device")
        return write_text(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    tracker.save_results_aggregated(results=dict(RESULTS), samples=None)
    assert not list((tmp_path / "output").rglob("*.json"))
    (record,) = read_results([tmp_path / "here"]).records
    assert record.metric("acc,none").value == 0.5


def test_no_writable_folder_is_reported(
    tmp_path: Path, tracker: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    tracker.save_results_aggregated(results=dict(RESULTS), samples=None)
    assert "the results are in the table below only" in caplog.text


def test_two_runs_in_one_folder_keep_both_results(tmp_path: Path, tracker: Any) -> None:
    from lm_eval.loggers import EvaluationTracker

    second = EvaluationTracker(output_path=tracker.output_path)
    second.general_config_tracker.model_name_sanitized = "model"
    for each in (tracker, second):
        save(each)
    assert len(list((tmp_path / "output").rglob("results_*.json"))) == 2
    assert len(list((tmp_path / "output").rglob("samples_*.jsonl"))) == 2


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_partial_result_and_another_run_is_complete(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Ctrl-C in one of two runs in one folder."""
    endless = start(*command(tiny_llama, tmp_path / "out", '{"eval_len": 64, "stride": 1, "max_rows": 0}'))
    other = start(*command(tiny_llama, tmp_path / "out"))
    shown = ""
    assert endless.stderr is not None
    while "Scoring windows" not in shown:  # the first windows are being scored
        piece = os.read(endless.stderr.fileno(), 4096)
        assert piece, shown
        shown += piece.decode(errors="replace")
    endless.send_signal(signal.SIGINT)
    endless.communicate(timeout=600)
    _, err = other.communicate(timeout=600)
    assert endless.returncode != 0
    assert other.returncode == 0, err
    reading = read_results([tmp_path / "out"])
    assert not reading.problems
    (record,) = reading.records
    assert record.protocol.windows == 5
    assert len([file for file in (tmp_path / "out").rglob("*") if file.is_file()]) == 1
