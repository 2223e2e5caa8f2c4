"""`compare run` with a reference: which job writes it, which are measured, in which order, and what is kept."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from compare.results.reading import read_results
from compare.run.plan.window_tasks import window_tasks
from tests.compare.run.conftest import Workshop, wait_for_end, whole_seconds


def harness_entry(name: str, **fields: Any) -> dict[str, Any]:
    """An entry in our own form."""
    fields = {"model": "vllm_nvfp4", **fields}
    return {"args": {"pretrained": f"models/{name}"}, "label": f"Model {name}", **fields}


@pytest.fixture
def referenced(workshop: Workshop) -> Workshop:
    """Model c is the reference of a and b."""
    workshop.entries = [harness_entry("a"), harness_entry("b"), harness_entry("c", reference=True)]
    workshop.write()
    return workshop


def roles(workshop: Workshop) -> dict[str, tuple[str, str]]:
    """The (argument, folder) of the reference with which each model was run, in order; ("", "") without one."""
    by_model = {}
    for call in workshop.stub_events():
        if "model" in call:
            args = call["model_args"]
            name = next((n for n in ("save_reference", "reference") if n in args), "")
            by_model[call["model"]] = (name, args.get(name, ""))
    return by_model


def kld(workshop: Workshop) -> dict[str, float | None]:
    """The mean KL divergence by label, of the results that have one."""
    records = read_results([workshop.results]).records
    return {r.label: r.metric("kld,none").value for r in records if "kld,none" in r.metrics}


def one_line(capsys: Any) -> str:
    """What was printed to stderr, which must be one line."""
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------------- what is run


def test_kld_with_reference_entry_measures_all_others(referenced: Workshop, capsys: Any) -> None:
    assert referenced.run("-kld") == 0
    (folder,) = (referenced.results / "reference").iterdir()
    assert list(roles(referenced).items()) == [
        ("c", ("save_reference", str(folder))),
        ("a", ("reference", str(folder))),
        ("b", ("reference", str(folder))),
    ]
    out = capsys.readouterr().out
    assert f"Reference: Model c, kept in {folder}" in out
    assert "perplexity 7.500000 ± 0.250, KL divergence 0.025000 ± 0.000500, 1,234" in out
    assert kld(referenced) == {"Model a": 0.025, "Model b": 0.02}


def test_reference_entry_without_kld_measures_nothing(referenced: Workshop) -> None:
    assert referenced.run() == 0
    assert roles(referenced) == dict.fromkeys("cab", ("", ""))


def test_compare_q_spec_and_flags_work_unchanged(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`-kld -lf FILE -p` with an entry with out_logits; FILE counts from the current folder."""
    workshop.entries[2]["out_logits"] = "models/ref_logits"
    workshop.write()
    monkeypatch.chdir(tmp_path)
    assert workshop.run("-kld", "-lf", "logits", "-p", "-pf", "plot.svg", "-mx", "9", "-dark") == 0
    folder = str(tmp_path / "logits")
    expected = {"c": ("save_reference", folder), "a": ("reference", folder), "b": ("reference", folder)}
    assert list(roles(workshop).items()) == list(expected.items())
    drawn = (tmp_path / "plot.svg").read_text()
    assert "KL divergence" in drawn
    assert "Model a" in drawn
    assert not (tmp_path / "models/ref_logits").exists()


@pytest.mark.slow
def test_out_logits_without_flags_measures_as_in_compare_q(workshop: Workshop, tmp_path: Path) -> None:
    """The folder counts from the spec and the plot shows perplexity; -kld then runs nothing again."""
    workshop.entries[2]["out_logits"] = "refs"
    workshop.write()
    assert workshop.run("-p", "-pf", str(tmp_path / "plot.svg")) == 0
    (folder,) = (tmp_path / "refs").iterdir()
    assert roles(workshop)["a"] == ("reference", str(folder))
    assert "Perplexity" in (tmp_path / "plot.svg").read_text()
    assert workshop.run("-kld", "-p", "-pf", str(tmp_path / "plot.svg")) == 0
    assert workshop.calls() == []
    assert "KL divergence" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_lf_with_stored_reference_measures_against_it(referenced: Workshop, tmp_path: Path, capsys: Any) -> None:
    """-lf as in compare_q, where no entry writes the reference. Its content counts, not its place."""
    folder = tmp_path / "stored"
    assert referenced.run("-kld", "-lf", str(folder)) == 0
    referenced.entries[2].pop("reference")
    referenced.write()
    referenced.calls()
    assert referenced.run("-lf", str(folder)) == 0
    assert roles(referenced) == {"c": ("reference", str(folder))}  # a and b were measured against it
    for mark in folder.glob("*.complete"):  # as `lm_eval` alone leaves the store
        mark.unlink()
    assert referenced.run("-lf", str(folder)) == 0
    assert list(roles(referenced)) == ["a", "b", "c"]
    shutil.move(folder, tmp_path / "elsewhere")
    assert referenced.run("-lf", str(tmp_path / "elsewhere")) == 0
    assert roles(referenced) == {}
    capsys.readouterr()
    assert referenced.run("-lf", str(folder)) == 1
    assert "no reference is stored there, and no entry writes one; add `reference: true`" in one_line(capsys)
    (tmp_path / "file").write_text("")
    assert referenced.run("-lf", str(tmp_path / "file")) == 1
    assert "is a file" in one_line(capsys)


def test_kld_without_reference_entry_is_refused(workshop: Workshop, capsys: Any) -> None:
    for more in ((), ("--continue-on-error",)):
        assert workshop.run("-kld", *more) == 1
        error = one_line(capsys)
        assert "no entry is the reference" in error
        assert "add `reference: true` to the entry of the unquantized model" in error
        assert '"out_logits": "FOLDER"' in error
    assert workshop.calls() == []
    assert not workshop.results.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "hf"}, "the reference 'Model c' cannot be run: model hf writes no reference; use hf_quant"),
        ({"tasks": ["arc_easy"]}, "none of its tasks scores token windows (arc_easy)"),
        ({"args": {"pretrained": "./nowhere"}}, "no such file or folder"),
    ],
)
def test_unusable_reference_is_refused_or_left_out_on_request(
    referenced: Workshop, capsys: Any, change: dict[str, Any], words: str
) -> None:
    referenced.entries[2] |= change
    referenced.write()
    assert referenced.run("-kld") == 1
    assert words in one_line(capsys)
    assert referenced.calls() == []
    assert referenced.run("-kld", "--continue-on-error") == 0
    assert set(roles(referenced).values()) == {("", "")}
    assert "no divergence is measured" in capsys.readouterr().err


def test_two_references_are_refused_until_mask_selects_one(referenced: Workshop, capsys: Any) -> None:
    referenced.entries[1]["reference"] = True
    referenced.write()
    assert referenced.run("-kld") == 1
    assert "several entries are the reference ('Model b', 'Model c'); leave one, or choose it" in one_line(capsys)
    assert referenced.run("-kld", "-mask", "Model a;Model b") == 0
    assert [name for name, _ in roles(referenced).values()] == ["save_reference", "reference"]


def test_mask_without_the_reference_needs_a_stored_one(referenced: Workshop, capsys: Any) -> None:
    assert referenced.run("-kld", "-mask", "Model a") == 1
    assert "-mask leaves out the reference 'Model c', and none is stored" in one_line(capsys)
    assert referenced.run("-kld", "-mask", "Model c") == 0
    referenced.calls()
    assert referenced.run("-kld", "-mask", "Model a") == 0
    assert roles(referenced)["a"][0] == "reference"


def test_reference_arguments_go_only_to_jobs_that_can_be_measured(referenced: Workshop, capsys: Any) -> None:
    """Not to other models, not to tasks without windows that the reference has, and not over an entry's own."""
    for name in "defgh":
        referenced.model(name)
    referenced.entries += [
        harness_entry("d", model="hf"),
        harness_entry("e", tasks=["mmlu", "arc_easy"]),
        harness_entry("f", tasks=["mmlu", "wiki2_strided"], model="exl3"),
        harness_entry("g", tasks=["wiki2_gptq"]),
        harness_entry("h", args={"pretrained": "models/h", "reference": "models/a"}),
    ]
    referenced.write()
    assert referenced.run("-kld", "--dry-run") == 0
    shown = capsys.readouterr()
    given = {}
    for line in shown.out.splitlines():
        if line.startswith("    "):
            words = shlex.split(line)
            args = json.loads(words[words.index("--model_args") + 1])
            given[Path(args["pretrained"]).name] = [n for n in args if "reference" in n]
    measured = {name: ["reference"] for name in "abfh"}
    assert given == {"c": ["save_reference"], **measured, **{name: [] for name in "deg"}}
    assert f'"reference": "{referenced.root}/models/a"' in shown.out  # the entry's own, counted from the spec
    assert "no divergence for Model d: model hf measures none; use hf_quant" in shown.err
    assert "no divergence for Model e: no task with token windows (mmlu, arc_easy)" in shown.err
    assert "no divergence for Model g: the reference 'Model c' does not run wiki2_gptq; add it to its" in shown.err
    assert "no divergence for Model h: its own arguments name a reference" in shown.err


def test_reference_under_two_labels_is_run_once(referenced: Workshop) -> None:
    referenced.entries.append(harness_entry("c", label="Again"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]
    assert referenced.labels() == ["Again", "Model a", "Model b", "Model c"]


def test_window_tasks_equal_the_tasks_of_the_package() -> None:

    assert window_tasks(["mmlu", "sample_strided"]) == {"sample_strided"}
    assert window_tasks(["own_answers", "own_answers_greedy"]) == {"own_answers"}  # the other one generates
    assert {"wiki2_strided", "wiki2_gptq", "wiki2_llamacpp", "wiki2_sliding"} == window_tasks(["wiki2_perplexity"])
    assert window_tasks(["domains"]) == window_tasks(["domains_text"]) | {"domain_chat"}  # a group and a tag


# ---------------------------------------------------------------------- order


@pytest.mark.slow
def test_only_measured_models_wait_for_the_reference(referenced: Workshop) -> None:
    """--jobs 2: a stock model runs beside the reference; measured models start after its end."""
    referenced.model("d")
    referenced.entries.append(harness_entry("d", model="hf"))
    referenced.write()
    referenced.mark("c", "slow", "1.5")
    assert referenced.run("-kld", "--jobs", "2") == 0
    lines = referenced.stub_events()
    events = [f"+{line['model']}" if "model" in line else f"-{line['ended']}" for line in lines]
    assert events.index("-c") < min(events.index("+a"), events.index("+b"))
    assert events.index("+d") < events.index("-c")


def test_dry_run_with_divergence_shows_order_and_commands(referenced: Workshop, capsys: Any) -> None:
    assert referenced.run("-kld", "--dry-run") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("    ")]
    assert [line.partition(" (")[0] for line in lines] == [
        "Model c: to run",
        "Model a: to run after Model c",
        "Model b: to run after Model c",
    ]
    assert f'"save_reference": "{referenced.results}/reference/' in out
    assert not referenced.results.exists()
    referenced.run("-kld", "-mask", "Model c;Model a")
    capsys.readouterr()
    referenced.run("-kld", "--dry-run")
    out = capsys.readouterr().out
    assert "Model c: kept" in out
    assert "Model b: to run (" in out


@pytest.mark.slow
def test_interrupt_while_the_reference_is_written_continues_in_the_same_folder(referenced: Workshop) -> None:
    referenced.mark("c", "hang")
    process = referenced.start("-kld", "--jobs", "2")
    _, alive = referenced.wait_for_hanging_stub()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    wait_for_end(alive)
    assert process.returncode == 130
    before = roles(referenced)
    assert list(before) == ["c"]
    (referenced.root / "models/c/hang").unlink()
    assert referenced.run("-kld") == 0
    after = roles(referenced)
    assert list(after) == ["c", "a", "b"]
    assert after["c"] == before["c"]  # the same folder: the store is continued


# ---------------------------------------------------------------------- what is kept


@pytest.mark.slow
def test_results_without_divergence_are_run_again_for_kld(referenced: Workshop) -> None:
    assert referenced.run() == 0
    referenced.calls()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]  # results without divergence are not enough
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []
    referenced.model("d")
    referenced.entries.insert(0, harness_entry("d"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["d"]  # the stored reference is used


@pytest.mark.slow
def test_results_with_divergence_are_kept_without_kld(referenced: Workshop) -> None:
    assert referenced.run("-kld") == 0
    referenced.calls()
    assert referenced.run() == 0
    assert referenced.calls() == []
    assert referenced.run("-cc") == 0
    assert roles(referenced) == dict.fromkeys("cab", ("", ""))


@pytest.mark.slow
def test_removed_reference_is_written_again_only_when_needed(referenced: Workshop) -> None:
    assert referenced.run("-kld") == 0
    referenced.calls()
    (folder,) = (referenced.results / "reference").iterdir()
    shutil.rmtree(folder)
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []
    referenced.model("d")
    referenced.entries.append(harness_entry("d"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert roles(referenced) == {"c": ("save_reference", str(folder)), "d": ("reference", str(folder))}
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []


@pytest.mark.slow
def test_incomplete_reference_is_written_again_when_needed(referenced: Workshop) -> None:
    """Lost is its manifest; then all windows of one run, while another run has filled the folder again."""
    assert referenced.run("-kld") == 0
    (folder,) = (referenced.results / "reference").iterdir()
    for name, lost in (("d", folder / "reference.json"), ("e", folder)):
        referenced.model(name)
        referenced.entries.append(harness_entry(name))
        referenced.write()
        if lost.is_dir():
            shutil.rmtree(lost)
            referenced.data["dataset"] = "c4"
            referenced.write()
            assert referenced.run("-kld", "-mask", "Model c") == 0
            referenced.data["dataset"] = "wiki2"
            referenced.write()
        else:
            lost.unlink()
        referenced.calls()
        assert referenced.run("-kld") == 0
        assert referenced.calls() == ["c", name]


@pytest.mark.slow
def test_windows_of_another_task_go_into_the_same_reference_folder(referenced: Workshop) -> None:
    """A complete store of one task may lack the windows of another, so each run has its own mark."""
    assert referenced.run("-kld") == 0
    first = roles(referenced)
    referenced.data["dataset"] = "c4"
    referenced.write()
    assert referenced.run("-kld") == 0
    assert roles(referenced) == first
    assert referenced.run("-kld", "--limit", "2") == 0
    assert roles(referenced) == first


@pytest.mark.slow
def test_changed_reference_model_gets_another_folder(referenced: Workshop, capsys: Any, tmp_path: Path) -> None:
    lf = ("-lf", str(tmp_path / "named"))
    assert referenced.run("-kld") == 0
    before = roles(referenced)
    assert referenced.run("-kld", *lf) == 0
    assert roles(referenced) == {
        "c": ("save_reference", lf[1])
    }  # the others are measured already; -lf asks for it there
    referenced.model("c", weights=b"requantized" * 400)
    assert referenced.run("-kld") == 0
    after = roles(referenced)
    assert list(after) == ["c", "a", "b"]
    assert {folder for _, folder in after.values()}.isdisjoint(folder for _, folder in before.values())
    assert len(list((referenced.results / "reference").iterdir())) == 2
    capsys.readouterr()
    assert referenced.run("-kld", *lf) == 1
    assert "named: holds the reference of another model" in one_line(capsys)


@pytest.mark.slow
def test_clear_cache_removes_the_reference_and_keeps_other_files(referenced: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    flags = ("-kld", "-lf", str(folder))
    assert referenced.run(*flags) == 0
    (folder / "note.txt").write_text("mine")
    (folder / "windows/stale").write_text("")
    referenced.calls()
    assert referenced.run(*flags, "-cc", "-mask", "Model c") == 0
    assert referenced.calls() == ["c"]
    assert not (folder / "windows/stale").exists()
    assert (folder / "note.txt").exists()
    assert referenced.run(*flags) == 0
    assert referenced.calls() == []


# ---------------------------------------------------------------------- failures


def test_failed_reference_is_reported_once_and_stops_measured_models(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "boom", "torch.OutOfMemoryError: CUDA out of memory.")
    assert referenced.run("-kld", "--jobs", "2") == 2
    assert referenced.calls() == ["c"]
    out = capsys.readouterr().out
    assert "Model c: failed after 0 s: torch.OutOfMemoryError" in whole_seconds(out)
    assert "Model a, Model b: not run: the reference failed; correct it, or run the others without" in out
    (referenced.root / "models/c/boom").unlink()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]


@pytest.mark.slow
def test_continue_on_error_runs_others_without_divergence(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "boom", "RuntimeError: no")
    assert referenced.run("-kld", "--continue-on-error") == 0
    assert roles(referenced) == dict.fromkeys("cab", ("", "")) | {"c": ("save_reference", _folder(referenced))}
    out = capsys.readouterr()
    assert "Model a, Model b: run without divergence: the reference failed" in out.out
    assert "2 of 3 models have a result" in out.err
    (referenced.root / "models/c/boom").unlink()
    assert referenced.run("-kld") == 0  # results without divergence are run again
    assert referenced.calls() == ["c", "a", "b"]


def _folder(workshop: Workshop) -> str:
    """The folder of the store, known before it exists."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        workshop.run("-kld", "--dry-run")
    return next(part for part in text.getvalue().split('"') if "/reference/" in part)


@pytest.mark.slow
def test_failed_reference_without_flags_leaves_perplexities(workshop: Workshop, capsys: Any) -> None:
    workshop.entries[2]["out_logits"] = "refs"
    workshop.write()
    workshop.mark("c", "boom", "RuntimeError: no")
    assert workshop.run() == 3
    assert workshop.labels() == ["Model a", "Model b"]
    assert "Model a, Model b: run without divergence: the reference failed" in capsys.readouterr().out


def test_run_that_writes_no_reference_fails(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "forgetful")
    assert referenced.run("-kld") == 2
    assert f"no reference was written to {referenced.results}/reference/" in capsys.readouterr().out
    assert referenced.calls() == ["c"]


@pytest.mark.slow
def test_failed_measured_model_stops_no_other(referenced: Workshop) -> None:
    referenced.mark("a", "boom", "lmeval-ext: error: reference=…: other tokenizer; give the same")
    assert referenced.run("-kld") == 3
    assert referenced.calls() == ["c", "a", "b"]
