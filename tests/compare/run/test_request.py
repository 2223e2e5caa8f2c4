"""The command line of `compare run` as a typed request."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from compare.cli import build_parser, main
from compare.commands.run import request_of
from compare.comparison.comparison import Options
from compare.run.request import RunRequest
from compare.write import PlotRequest


def request(*words: str) -> RunRequest:
    return request_of(build_parser().parse_args(["run", "-m", "a.json", *words]))


def test_request_without_flags_has_the_defaults_of_the_class() -> None:
    assert request() == RunRequest(models=("a.json",))


def test_every_flag_reaches_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "b.json -d data.json --tasks x,y --limit 2 --log-samples -mask A;B -kld -lf refs --results out -cc --dry-run"
    )
    words += " --jobs 3 --continue-on-error --launcher ray --ray-address auto --gpu-gb 24 -pf plot.svg -v -t Title"
    made = request(*words.split(), "-mx", "5", "-my", "9", "-dark", "--harness", "python -m 'my harness'")
    assert made == RunRequest(
        models=("a.json", "b.json"),
        data=Path("data.json"),
        tasks=("x", "y"),
        limit=2.0,
        log_samples=True,
        mask="A;B",
        kld=True,
        reference_folder=tmp_path / "refs",
        results=Path("out"),
        clear_cache=True,
        dry_run=True,
        jobs=3,
        continue_on_error=True,
        launcher="ray",
        ray_address="auto",
        gpu_gb=24.0,
        harness=("python", "-m", "my harness"),
        plot=PlotRequest(Path("plot.svg"), "Title", dark=True),
        plot_options=Options(metrics=("kld",), axis="vram", max_x=5.0, max_y=9.0),
    )
    unset = [field.name for field in fields(made) if getattr(made, field.name) == getattr(request(), field.name)]
    assert unset == []  # each flag differs from its default, so none can be lost


@pytest.mark.parametrize(("words", "flag"), [((), ""), (("-lf", "x"), "-lf"), (("-kld", "-lf", "x"), "-kld")])
def test_divergence_flag_names_what_was_given(words: tuple[str, ...], flag: str) -> None:
    assert request(*words).divergence_flag == flag


def test_harness_with_an_open_quote_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "-m", "a.json", "--harness", "python 'x"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--harness" in error
    assert "is not a command (No closing quotation)" in error
