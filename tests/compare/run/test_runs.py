"""`compare run` with a stub for the harness: what is run, kept, plotted and reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compare.run.plan import job
from tests.compare.run.conftest import Workshop, whole_seconds, write_safetensors


def test_every_model_is_run_and_reported_in_one_line(workshop: Workshop, capsys: Any) -> None:
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "Loading dataset: wiki2 (windows of 2048 tokens, one every 512, the first 20; blank rows kept)" in out
    assert f"Loading: {workshop.root}/models/a (Model a)" in out
    assert "Model a: 4.00 bpw (decoder), 16.00 bpw (head), perplexity 7.500000 ± 0.250, 1,234 tokens/s" in out
    assert workshop.labels() == ["Model a", "Model b", "Model c"]
    assert len(list((workshop.results / "logs").glob("Model-*.log"))) == 3
    assert not list((workshop.results / ".work").iterdir())


def test_same_command_again_runs_nothing(workshop: Workshop, capsys: Any) -> None:
    workshop.run()
    workshop.calls()
    assert workshop.run() == 0
    assert workshop.calls() == []
    assert capsys.readouterr().out.count("(kept)") == 3


def test_changed_label_family_and_override_run_nothing_again(workshop: Workshop) -> None:
    workshop.run()
    workshop.calls()
    workshop.entries[0] |= {"label": "Renamed [red]", "family": "exl3", "override_bpw_layer": 3.5}
    workshop.entries[0] |= {"override_vram_bits": 8 * 1024**3 * 7, "override_bpw_head": 6.0}
    workshop.write()
    assert workshop.run() == 0
    assert workshop.calls() == []
    from compare.results.reading import read_results

    record = next(r for r in read_results([workshop.results]).records if r.label == "Renamed")
    q = record.quantization
    assert (record.colour, q.family, q.layer_bpw, q.head_bpw, q.vram_gb) == ("red", "EXL3", 3.5, 6.0, 7.0)
    assert "told by the spec" in q.notes[-1]
    workshop.entries[0] = {k: v for k, v in workshop.entries[0].items() if not k.startswith("override")}
    workshop.write()
    workshop.run()
    record = next(r for r in read_results([workshop.results]).records if r.label == "Renamed")
    assert (record.quantization.layer_bpw, workshop.calls()) == (4.0, [])


def test_changed_weights_run_again_and_a_copy_does_not(workshop: Workshop) -> None:
    workshop.run()
    workshop.calls()
    a, b = workshop.root / "models/a", workshop.root / "models/b"
    size = (a / "model.safetensors").stat().st_size
    write_safetensors(a / "model.safetensors", b"A" * 4096)  # same header, same size, other weights
    assert (a / "model.safetensors").stat().st_size == size
    shutil.copytree(b, workshop.root / "elsewhere")  # without dates
    shutil.rmtree(b)
    workshop.entries[1]["model_dir"] = "elsewhere"
    workshop.write()
    assert workshop.run() == 0
    assert workshop.calls() == ["a"]


@pytest.mark.slow
def test_changed_settings_and_engine_version_run_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.run()
    workshop.calls()
    for change in ({"eval_len": 1024}, {"max_rows": 10}, {"warmup_tokens": 8}, {"blank_rows": "drop"}):
        workshop.data |= change
        workshop.write()
        workshop.run("-mask", "model a")
        assert workshop.calls() == ["a"], change
    workshop.run("-mask", "model a", "--limit", "2")
    assert workshop.calls() == ["a"]
    workshop.run("-mask", "model a", "--tasks", "arc_easy")
    assert workshop.calls() == ["a"]
    monkeypatch.setattr(job, "engine_version", lambda model: "vllm 99")
    workshop.run("-mask", "model a")
    assert workshop.calls() == ["a"]


def test_mask_limits_runs_and_clear_cache(workshop: Workshop, capsys: Any) -> None:
    assert workshop.run("-mask", "MODEL A;el c") == 0
    assert workshop.calls() == ["a", "c"]
    workshop.run("-cc", "-mask", "model c")
    assert workshop.calls() == ["c"]
    assert workshop.run("-mask", "nothing") == 1
    assert "no label contains" in capsys.readouterr().err


def test_failure_is_reported_with_log_and_hint_and_the_others_run(workshop: Workshop, capsys: Any) -> None:
    workshop.mark("a", "boom", "starting\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert workshop.run() == 3
    assert workshop.calls() == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert (
        "Model a: failed after 0 s: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
        in whole_seconds(out)
    )
    assert "    | starting" in out
    assert "hint: GPU memory is short" in out
    assert workshop.labels() == ["Model b", "Model c"]
    (workshop.root / "models/a/boom").unlink()
    assert workshop.run() == 0
    assert workshop.calls() == ["a"]


def test_error_of_our_adapters_has_no_hint(workshop: Workshop, capsys: Any) -> None:
    workshop.mark("a", "boom", "some warning\nlmeval-ext: error: eval_len=9 is beyond the model's context; lower it")
    workshop.run()
    out = capsys.readouterr().out
    assert "Model a: failed after 0 s: eval_len=9 is beyond the model's context; lower it\n    log:" in whole_seconds(
        out
    )


@pytest.mark.parametrize(
    ("how", "text", "words"),
    [
        ("exit", "-9", "hint: killed from outside (signal 9)"),
        ("exit", "-11", "hint: crashed in the engine's own code"),
        ("silent", "", "ended without a result file"),
        ("silent", "", "hint: the disk is full"),
        ("half", "", "ended without a result file"),
    ],
)
def test_failure_names_its_reason(workshop: Workshop, capsys: Any, how: str, text: str, words: str) -> None:
    workshop.mark("b", how, text)
    assert workshop.run() == 3
    assert words in capsys.readouterr().out
    assert workshop.labels() == ["Model a", "Model c"]


def test_unavailable_models_are_reported_and_the_others_run(workshop: Workshop, capsys: Any) -> None:
    workshop.entries[0]["model_dir"] = "./models/away"
    workshop.entries[1]["model_dir"] = "./models/nowhere"
    workshop.write()
    assert workshop.run() == 3
    out = capsys.readouterr().out
    assert f"Model a: not run: no such file or folder: {workshop.root}/models/away" in out
    assert f"Model b: not run: no such file or folder: {workshop.root}/models/nowhere" in out
    assert "models.json: entry 2" in out
    assert workshop.calls() == ["c"]
    assert workshop.run("--continue-on-error") == 0
    assert workshop.run("--continue-on-error", "-mask", "model a") == 2


def test_two_entries_of_one_model_are_run_once_under_two_labels(workshop: Workshop, capsys: Any) -> None:
    workshop.entries.append({**workshop.entries[0], "label": "Again"})
    workshop.write()
    workshop.run()
    assert workshop.calls() == ["a", "b", "c"]
    assert "Model a, Again: the same model" in capsys.readouterr().err
    assert workshop.labels() == ["Again", "Model a", "Model b", "Model c"]


def test_entry_with_out_logits_runs_first(workshop: Workshop) -> None:
    workshop.entries[2]["out_logits"] = "somewhere"
    workshop.write()
    workshop.run()
    assert workshop.calls() == ["c", "a", "b"]


def test_entry_with_reference_runs_first_and_is_marked(workshop: Workshop) -> None:
    args = {"pretrained": "models/c"}
    workshop.entries[2] = {"model": "vllm_nvfp4", "args": args, "label": "Model c", "reference": True}
    workshop.write()
    workshop.run()
    assert workshop.calls() == ["c", "a", "b"]
    from compare.results.reading import read_results

    records = read_results([workshop.results]).records
    assert [r.label for r in records if r.is_baseline] == ["Model c"]
    assert {r.quantization.family for r in records} == {"NVFP4"}  # a reference keeps its family


def test_dry_run_runs_and_writes_nothing(workshop: Workshop, capsys: Any) -> None:
    assert workshop.run("--dry-run") == 0
    out = capsys.readouterr().out
    assert "Model a: to run" in out
    assert "--tasks wiki2_strided" in out
    assert not workshop.results.exists()
    workshop.run("-mask", "model a")
    capsys.readouterr()
    workshop.run("--dry-run")
    assert "Model a: kept" in capsys.readouterr().out


def test_plot_shows_the_selected_models(workshop: Workshop, capsys: Any) -> None:
    picture = workshop.root / "out.svg"
    workshop.run()
    flags = ["-p", "-v", "-t", "A title", "-mx", "1.3", "-my", "100", "-dark", "-pf", str(picture)]
    assert workshop.run("-mask", "model a;model b", *flags) == 0
    drawn = picture.read_text()
    assert "A title" in drawn
    assert "Model a" in drawn
    assert "Model c" not in drawn
    assert "VRAM" in drawn


def test_plot_without_a_display_is_written_into_results(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert workshop.run("-p") == 0
    assert (workshop.results / "plot.png").stat().st_size > 1000


def test_unusable_plot_file_is_refused_before_any_run(workshop: Workshop, capsys: Any) -> None:
    assert workshop.run("-p", "-pf", str(workshop.root / "no/folder.png")) == 1
    assert workshop.run("-p", "-pf", str(workshop.root / "x.gif")) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert workshop.calls() == []


def test_damaged_index_is_refused_and_results_survive_it(workshop: Workshop, capsys: Any) -> None:
    workshop.run()
    (workshop.results / "compare_run.json").write_text("[]")
    assert workshop.run() == 1
    assert "compare_run.json: is not an index of compare run; remove it" in capsys.readouterr().err
    (workshop.results / "compare_run.json").unlink()
    workshop.calls()
    assert workshop.run() == 0
    assert workshop.calls() == []
    assert workshop.labels() == ["Model a", "Model b", "Model c"]


def test_hostile_label_is_shown_as_text(workshop: Workshop, capsys: Any) -> None:
    workshop.entries[0]["label"] = "../../x\x1b[31m\n<script>"
    workshop.write()
    assert workshop.run() == 0
    assert "\x1b" not in capsys.readouterr().out
    names = [p.name for p in (workshop.results / "logs").iterdir()]
    assert any(name.startswith("x-31m-script-") for name in names)


def test_jobs_are_assigned_gpus(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert workshop.run("--jobs", "3") == 0
    gpus = [call["gpus"] for call in workshop.stub_events() if "gpus" in call]
    assert sorted(gpus) in (["3", "3", "5"], ["3", "5", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    workshop.run("--jobs", "2", "-cc")


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv=['compare','run','--help']\n"
        "from compare.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'pydantic','yaml','rich','matplotlib','torch','numpy','pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-mask" in done.stdout


def test_dry_run_imports_neither_torch_nor_the_harness(workshop: Workshop) -> None:
    code = (
        "import sys; from compare.cli import main\n"
        f"main({workshop.arguments('--dry-run')!r})\n"
        "heavy = {'torch','transformers','lmeval_ext.errors','lm_eval','vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_relative_paths_are_resolved_from_the_spec(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]


def test_large_limit_reaches_the_harness_unrounded(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("--dry-run", "--limit", "1234567") == 0
    shown = capsys.readouterr()
    assert "--limit 1234567 " in shown.out + shown.err + " "


def test_samples_are_stored_beside_results(workshop: Workshop) -> None:
    assert workshop.run("-mask", "Model a") == 0
    workshop.calls()
    assert workshop.run("--log-samples", "--limit", "2") == 0
    assert workshop.calls() == ["a", "b", "c"]
    assert len(list(workshop.results.glob("*/samples_wiki2_strided_*.jsonl"))) == 3
    assert workshop.run("--log-samples", "-mask", "Model a") == 0
    assert workshop.calls() == ["a"]  # a result without samples is not enough
    assert workshop.run("--log-samples", "-mask", "Model a") == 0
    assert workshop.run("-mask", "Model a") == 0
    assert workshop.calls() == []  # one with samples is used for both
    assert workshop.labels().count("Model a") == 2  # the limited and the complete result; not a third one
