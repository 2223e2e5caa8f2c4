"""`compare run` with a reference: who writes it, who is measured against it, in which order, and what is kept."""

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
from tests.compare.run.conftest import Workshop
from tests.compare.run.test_robustness import _ended, _hanging


def ours(name: str, **fields: Any) -> dict[str, Any]:
    """An entry in our own form."""
    fields = {"model": "vllm_nvfp4", **fields}
    return {"args": {"pretrained": f"models/{name}"}, "label": f"Model {name}", **fields}


@pytest.fixture
def referenced(workshop: Workshop) -> Workshop:
    """Model c is the reference of a and b."""
    workshop.entries = [ours("a"), ours("b"), ours("c", reference=True)]
    workshop.write()
    return workshop


def parts(workshop: Workshop) -> dict[str, tuple[str, str]]:
    """(argument, folder) with which each model was run, in order; ("", "") for none."""
    found = {}
    for call in workshop.told():
        if "model" in call:
            args = call["model_args"]
            name = next((n for n in ("save_reference", "reference") if n in args), "")
            found[call["model"]] = (name, args.get(name, ""))
    return found


def kld(workshop: Workshop) -> dict[str, float | None]:
    records = read_results([workshop.results]).records
    return {r.label: r.metric("kld,none").value for r in records if "kld,none" in r.metrics}


def one_line(capsys: Any) -> str:
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------------- what is run


def test_reference_of_our_own_form(referenced: Workshop, capsys: Any) -> None:
    assert referenced.run("-kld") == 0
    (folder,) = (referenced.results / "reference").iterdir()
    assert list(parts(referenced).items()) == [
        ("c", ("save_reference", str(folder))),
        ("a", ("reference", str(folder))),
        ("b", ("reference", str(folder))),
    ]
    out = capsys.readouterr().out
    assert f"Reference: Model c, kept in {folder}" in out
    assert "perplexity 7.500000 ± 0.250, KL divergence 0.025000 ± 0.000500, 1,234" in out
    assert kld(referenced) == {"Model a": 0.025, "Model b": 0.02}


def test_without_the_flag_a_reference_is_a_line_in_the_plot(referenced: Workshop) -> None:
    assert referenced.run() == 0
    assert parts(referenced) == dict.fromkeys("cab", ("", ""))


def test_compare_qs_spec_and_flags_unchanged(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`-kld -lf FILE -p` beside an entry with out_logits; the file counts from where one stands."""
    workshop.entries[2]["out_logits"] = "models/ref_logits"
    workshop.write()
    monkeypatch.chdir(tmp_path)
    assert workshop.run("-kld", "-lf", "logits", "-p", "-pf", "plot.svg", "-mx", "9", "-dark") == 0
    folder = str(tmp_path / "logits")
    expected = {"c": ("save_reference", folder), "a": ("reference", folder), "b": ("reference", folder)}
    assert list(parts(workshop).items()) == list(expected.items())
    drawn = (tmp_path / "plot.svg").read_text()
    assert "KL divergence" in drawn
    assert "Model a" in drawn
    assert not (tmp_path / "models/ref_logits").exists()


def test_out_logits_alone_measures_as_in_compare_q(workshop: Workshop, tmp_path: Path) -> None:
    """The folder counts from the spec; the plot shows perplexity; -kld then has everything already."""
    workshop.entries[2]["out_logits"] = "refs"
    workshop.write()
    assert workshop.run("-p", "-pf", str(tmp_path / "plot.svg")) == 0
    (folder,) = (tmp_path / "refs").iterdir()
    assert parts(workshop)["a"] == ("reference", str(folder))
    assert "Perplexity" in (tmp_path / "plot.svg").read_text()
    assert workshop.run("-kld", "-p", "-pf", str(tmp_path / "plot.svg")) == 0
    assert workshop.calls() == []
    assert "KL divergence" in (tmp_path / "plot.svg").read_text()


def test_a_stored_reference_by_name(referenced: Workshop, tmp_path: Path, capsys: Any) -> None:
    """-lf as in compare_q: no entry writes it. What it holds decides, and not where it lies."""
    folder = tmp_path / "stored"
    assert referenced.run("-kld", "-lf", str(folder)) == 0
    referenced.entries[2].pop("reference")
    referenced.write()
    referenced.calls()
    assert referenced.run("-lf", str(folder)) == 0
    assert parts(referenced) == {"c": ("reference", str(folder))}  # a and b were measured against it
    for mark in folder.glob("*.complete"):  # as lm_eval itself leaves it
        mark.unlink()
    assert referenced.run("-lf", str(folder)) == 0
    assert list(parts(referenced)) == ["a", "b", "c"]
    shutil.move(folder, tmp_path / "elsewhere")
    assert referenced.run("-lf", str(tmp_path / "elsewhere")) == 0
    assert parts(referenced) == {}
    capsys.readouterr()
    assert referenced.run("-lf", str(folder)) == 1
    assert "no reference is stored there, and no entry writes one; add `reference: true`" in one_line(capsys)
    (tmp_path / "file").write_text("")
    assert referenced.run("-lf", str(tmp_path / "file")) == 1
    assert "is a file" in one_line(capsys)


def test_no_entry_is_the_reference(workshop: Workshop, capsys: Any) -> None:
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
def test_what_cannot_be_a_reference(referenced: Workshop, capsys: Any, change: dict[str, Any], words: str) -> None:
    referenced.entries[2] |= change
    referenced.write()
    assert referenced.run("-kld") == 1
    assert words in one_line(capsys)
    assert referenced.calls() == []
    assert referenced.run("-kld", "--continue-on-error") == 0
    assert set(parts(referenced).values()) == {("", "")}
    assert "no divergence is measured" in capsys.readouterr().err


def test_two_references_and_a_mask_that_chooses(referenced: Workshop, capsys: Any) -> None:
    referenced.entries[1]["reference"] = True
    referenced.write()
    assert referenced.run("-kld") == 1
    assert "several entries are the reference ('Model b', 'Model c'); leave one, or choose it" in one_line(capsys)
    assert referenced.run("-kld", "-mask", "Model a;Model b") == 0
    assert [name for name, _ in parts(referenced).values()] == ["save_reference", "reference"]


def test_a_mask_that_leaves_the_reference_out(referenced: Workshop, capsys: Any) -> None:
    assert referenced.run("-kld", "-mask", "Model a") == 1
    assert "-mask leaves out the reference 'Model c', and none is stored" in one_line(capsys)
    assert referenced.run("-kld", "-mask", "Model c") == 0
    referenced.calls()
    assert referenced.run("-kld", "-mask", "Model a") == 0
    assert parts(referenced)["a"][0] == "reference"


def test_others_than_our_windows_and_models(referenced: Workshop, capsys: Any) -> None:
    """Reference arguments go only where something is measured."""
    for name in "defgh":
        referenced.model(name)
    referenced.entries += [
        ours("d", model="hf"),
        ours("e", tasks=["mmlu", "arc_easy"]),
        ours("f", tasks=["mmlu", "wiki2_strided"], model="exl3"),
        ours("g", tasks=["wiki2_gptq"]),
        ours("h", args={"pretrained": "models/h", "reference": "models/a"}),
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
    assert f'"reference": "{referenced.root}/models/a"' in shown.out  # its own, counted from the spec
    assert "no divergence for Model d: model hf measures none; use hf_quant" in shown.err
    assert "no divergence for Model e: no task with token windows (mmlu, arc_easy)" in shown.err
    assert "no divergence for Model g: the reference 'Model c' does not run wiki2_gptq; add it to its" in shown.err
    assert "no divergence for Model h: its own arguments name a reference" in shown.err


def test_the_reference_under_two_labels_is_run_once(referenced: Workshop) -> None:
    referenced.entries.append(ours("c", label="Again"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]
    assert referenced.labels() == ["Again", "Model a", "Model b", "Model c"]


def test_window_tasks_are_those_of_the_package() -> None:
    from lmeval_ext.tasks.protocols import PROTOCOLS

    assert window_tasks(["mmlu", "sample_strided"]) == {"sample_strided"}
    assert {"wiki2_strided", "wiki2_gptq", "wiki2_llamacpp", "wiki2_sliding"} <= window_tasks(["wiki2_perplexity"])
    assert len(window_tasks(["wiki2_perplexity"])) == len(PROTOCOLS)


# ---------------------------------------------------------------------- order


def test_dependents_wait_and_others_do_not(referenced: Workshop) -> None:
    """--jobs 2: the stock model runs beside the reference, those measured against it only after its end."""
    referenced.model("d")
    referenced.entries.append(ours("d", model="hf"))
    referenced.write()
    referenced.mark("c", "slow", "1.5")
    assert referenced.run("-kld", "--jobs", "2") == 0
    told = referenced.told()
    events = [f"+{line['model']}" if "model" in line else f"-{line['ended']}" for line in told]
    assert events.index("-c") < min(events.index("+a"), events.index("+b"))
    assert events.index("+d") < events.index("-c")


def test_dry_run_shows_order_and_commands(referenced: Workshop, capsys: Any) -> None:
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


def test_interrupted_while_the_reference_is_written(referenced: Workshop) -> None:
    referenced.mark("c", "hang")
    process = referenced.start("-kld", "--jobs", "2")
    _, alive = _hanging(referenced)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _ended(alive)
    assert process.returncode == 130
    before = parts(referenced)
    assert list(before) == ["c"]
    (referenced.root / "models/c/hang").unlink()
    assert referenced.run("-kld") == 0
    after = parts(referenced)
    assert list(after) == ["c", "a", "b"]
    assert after["c"] == before["c"]  # the same folder: the store goes on where it was


# ---------------------------------------------------------------------- what is kept


def test_kept_and_run_again(referenced: Workshop) -> None:
    assert referenced.run() == 0
    referenced.calls()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]  # results without divergence do not serve
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []
    referenced.model("d")
    referenced.entries.insert(0, ours("d"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["d"]  # the stored reference serves


def test_a_result_with_divergence_serves_without(referenced: Workshop) -> None:
    assert referenced.run("-kld") == 0
    referenced.calls()
    assert referenced.run() == 0
    assert referenced.calls() == []
    assert referenced.run("-cc") == 0
    assert parts(referenced) == dict.fromkeys("cab", ("", ""))


def test_a_store_that_vanished(referenced: Workshop) -> None:
    """It is written again once somebody needs it."""
    assert referenced.run("-kld") == 0
    referenced.calls()
    (folder,) = (referenced.results / "reference").iterdir()
    shutil.rmtree(folder)
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []
    referenced.model("d")
    referenced.entries.append(ours("d"))
    referenced.write()
    assert referenced.run("-kld") == 0
    assert parts(referenced) == {"c": ("save_reference", str(folder)), "d": ("reference", str(folder))}
    assert referenced.run("-kld") == 0
    assert referenced.calls() == []


def test_a_store_that_lost_a_part(referenced: Workshop) -> None:
    """Its manifest; and all windows of one run, while another has filled the folder anew."""
    assert referenced.run("-kld") == 0
    (folder,) = (referenced.results / "reference").iterdir()
    for name, lost in (("d", folder / "reference.json"), ("e", folder)):
        referenced.model(name)
        referenced.entries.append(ours(name))
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


def test_other_windows_go_into_the_same_store(referenced: Workshop) -> None:
    """A store is filled per run: that of one task says nothing of another's windows."""
    assert referenced.run("-kld") == 0
    first = parts(referenced)
    referenced.data["dataset"] = "c4"
    referenced.write()
    assert referenced.run("-kld") == 0
    assert parts(referenced) == first
    assert referenced.run("-kld", "--limit", "2") == 0
    assert parts(referenced) == first


def test_another_reference_is_another_store(referenced: Workshop, capsys: Any, tmp_path: Path) -> None:
    lf = ("-lf", str(tmp_path / "named"))
    assert referenced.run("-kld") == 0
    before = parts(referenced)
    assert referenced.run("-kld", *lf) == 0
    assert parts(referenced) == {"c": ("save_reference", lf[1])}  # the others are measured; but -lf wants it there
    referenced.model("c", weights=b"requantized" * 400)
    assert referenced.run("-kld") == 0
    after = parts(referenced)
    assert list(after) == ["c", "a", "b"]
    assert {folder for _, folder in after.values()}.isdisjoint(folder for _, folder in before.values())
    assert len(list((referenced.results / "reference").iterdir())) == 2
    capsys.readouterr()
    assert referenced.run("-kld", *lf) == 1
    assert "named: holds the reference of another model" in one_line(capsys)


def test_clear_cache_has_the_reference_written_anew(referenced: Workshop, tmp_path: Path) -> None:
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


def test_a_reference_that_fails_is_said_once(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "boom", "torch.OutOfMemoryError: CUDA out of memory.")
    assert referenced.run("-kld", "--jobs", "2") == 2
    assert referenced.calls() == ["c"]
    out = capsys.readouterr().out
    assert "Model c: failed after 0 s: torch.OutOfMemoryError" in out
    assert "Model a, Model b: not run: the reference failed; mend it, or run the others without" in out
    (referenced.root / "models/c/boom").unlink()
    assert referenced.run("-kld") == 0
    assert referenced.calls() == ["c", "a", "b"]


def test_going_on_without_the_reference(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "boom", "RuntimeError: no")
    assert referenced.run("-kld", "--continue-on-error") == 0
    assert parts(referenced) == dict.fromkeys("cab", ("", "")) | {"c": ("save_reference", _folder(referenced))}
    out = capsys.readouterr()
    assert "Model a, Model b: run without divergence: the reference failed" in out.out
    assert "2 of 3 models have a result" in out.err
    (referenced.root / "models/c/boom").unlink()
    assert referenced.run("-kld") == 0  # what was run without is measured now
    assert referenced.calls() == ["c", "a", "b"]


def _folder(workshop: Workshop) -> str:
    """The store's folder, named before it is there."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        workshop.run("-kld", "--dry-run")
    return next(part for part in text.getvalue().split('"') if "/reference/" in part)


def test_perplexities_do_not_wait_for_a_divergence_that_no_flag_asks_for(workshop: Workshop, capsys: Any) -> None:
    workshop.entries[2]["out_logits"] = "refs"
    workshop.write()
    workshop.mark("c", "boom", "RuntimeError: no")
    assert workshop.run() == 3
    assert workshop.labels() == ["Model a", "Model b"]
    assert "Model a, Model b: run without divergence: the reference failed" in capsys.readouterr().out


def test_a_reference_that_is_not_there_afterwards(referenced: Workshop, capsys: Any) -> None:
    referenced.mark("c", "forgetful")
    assert referenced.run("-kld") == 2
    assert f"no reference was written to {referenced.results}/reference/" in capsys.readouterr().out
    assert referenced.calls() == ["c"]


def test_a_measured_model_that_fails_stops_no_other(referenced: Workshop) -> None:
    referenced.mark("a", "boom", "lmeval-ext: error: reference=…: other tokenizer; give the same")
    assert referenced.run("-kld") == 3
    assert referenced.calls() == ["c", "a", "b"]
