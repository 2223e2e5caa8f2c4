"""Reading result folders: usable files are read, all others are named with the reason."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.plot.captions import caption
from compare.plot.series import arrange
from compare.results.reading import model_arguments, read_file, read_results
from compare.results.records import UNSTATED
from tests.compare.conftest import result
from tests.compare.divergence_files import divergent, write
from tests.conftest import simple_evaluate
from tests.fast_guard import examples

BROKEN = {
    "results_truncated.json": json.dumps(result()).encode()[:700],
    "results_empty.json": b"",
    "results_list.json": b"[1, 2]",
    "results_number.json": b"3",
    "results_foreign.json": b'{"name": "package"}',
    "results_results_is_list.json": b'{"results": []}',
    "results_no_task.json": b'{"results": {}}',
    "results_task_is_text.json": b'{"results": {"t": "x"}, "config": 3}',
    "results_binary.json": bytes(range(256)),
    "results_deep.json": b"[" * 200_000,
    "results_huge_number.json": b'{"results": {"t": {"a,none": ' + b"9" * 10_000 + b"}}}",
}


def test_unusable_files_are_named_and_the_others_are_read(folder, compare):
    folder.add("good")
    for name, data in BROKEN.items():
        folder.raw(name, data)
    (folder.path / "results_folder.json").mkdir()
    out = compare("table", folder.path, "--format", "json")
    assert out.code == 0
    assert [r["label"] for r in out.json] == ["good"]
    for name in [*BROKEN, "results_folder.json"]:
        lines = [line for line in out.err.splitlines() if name in line]
        assert len(lines) == 1, name
        assert lines[0].startswith("compare: skipped: ")
    assert "Traceback" not in out.err


@pytest.mark.parametrize("command", [["table"], ["plot", "-o", "x.png"]])
def test_no_usable_file_is_exit_code_2(folder, compare, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder.raw("results_bad.json", b"{")
    out = compare(command[0], folder.path, *command[1:])
    assert out.code == 2
    assert "results_bad.json" in out.err
    assert compare(command[0], tmp_path / "absent", *command[1:]).code == 2
    assert not (tmp_path / "x.png").exists()


def test_a_named_pipe_is_not_read(folder):
    os.mkfifo(folder.path / "results_pipe.json")
    (problem,) = read_results([folder.path]).problems
    assert "regular file" in problem.reason


def test_unreadable_file_is_named(folder, compare, monkeypatch):
    folder.add("good")
    locked = folder.add("locked")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    out = compare("table", folder.path, "--format", "json")
    assert [r["label"] for r in out.json] == ["good"]
    assert f"skipped: {locked}: Permission denied" in out.err


def test_null_nan_and_text_figures_are_none(folder):
    content = result(ppl=float("nan"), stderr="N/A")
    content["results"]["wiki2_strided"] |= {"a,none": None, "b,none": True, "c,none": "text", "d,none": float("inf")}
    (record,) = read_file(folder.write(content))
    assert record.metric("token_perplexity,none").value is None
    assert record.metric("token_perplexity,none").stderr is None
    assert set(record.metrics) == {"token_perplexity,none", "top1_accuracy,none", "a,none", "d,none"}
    assert record.metric("d,none").value is None


def test_wrong_types_in_the_quantization_block_are_unknown(folder):
    content = result(layer_bpw="4.5", head_bpw=True, vram_gb=-1, weight_bytes=[1], notes="x", family=7, kernel={})
    (record,) = read_file(folder.write(content))
    q = record.quantization
    assert (q.layer_bpw, q.head_bpw, q.vram_gb, q.weight_bytes, q.notes, q.family, q.kernel) == (
        None, None, None, None, (), "unknown", None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("pretrained=/m/SmolLM2,dtype=float32", {"pretrained": "/m/SmolLM2", "dtype": "float32"}),
        ({"pretrained": "x", "n": 3}, {"pretrained": "x", "n": "3"}),
        ("", {}),
        (None, {}),
        ([1], {}),
    ],
)
def test_model_arguments(arguments, expected):
    assert model_arguments(arguments) == expected


@pytest.mark.parametrize(
    ("model_args", "signs"),
    [
        ("pretrained=/m/SmolLM2-135M,dtype=float32", ""),
        ({"pretrained": "Qwen/Qwen3-8B", "dtype": "bfloat16"}, ""),
        ("pretrained=/m/SmolLM2-135M,dtype=auto", ""),
        ("pretrained=/m/SmolLM2-135M,dtype=float16,parallelize=True", ""),
        ("pretrained=/m/SmolLM2-135M", ""),
        ("pretrained=/m/SmolLM2-135M-AWQ,dtype=float16", "its name"),
        ("pretrained=/m/SmolLM2-AWQ/snapshot,dtype=float16", "its name"),
        ("pretrained=C:\\\\m\\SmolLM2-GPTQ\\x,dtype=float16", "its name"),
        ("pretrained=/m/SmolLM2-NVFP4A16,dtype=bfloat16", "its name"),
        ("pretrained=org/m,revision=gptq-4bit,dtype=float16", "its name"),
        ("pretrained=/m/SmolLM2,dtype=bfloat16,load_in_4bit=True", "its argument load_in_4bit"),
        ({"pretrained": "/m/x", "dtype": "bfloat16", "load_in_8bit": True}, "its argument load_in_8bit"),
        ("pretrained=/m/SmolLM2,dtype=bfloat16,load_in_4bit=False", ""),
        ({"pretrained": "/m/x", "dtype": "float16", "quantization": None}, ""),
        ("pretrained=/m/x,dtype=float16,quantization=fp8", "its argument quantization"),
        ("pretrained=/m/x-FP8,dtype=auto,quantization=fp8", "its argument quantization and its name"),
        ("pretrained=/m/repo,gguf_file=a-Q4_K_M.gguf,dtype=float32", "its argument gguf_file"),
    ],
)
def test_weights_of_a_stock_model_are_unknown_whatever_its_dtype_and_name(folder, model_args, signs):
    content = result(quantized=False)
    content["config"] |= {"model": "hf", "model_args": model_args}
    (record,) = read_file(folder.write(content))
    q = record.quantization
    assert (q.family, q.known, q.scheme, record.is_baseline) == ("unknown", False, "", False)
    assert q.caveats == (f"{UNSTATED}; quantized by {signs}" if signs else UNSTATED,)
    assert q.looks_quantized == bool(signs)
    assert record.label.startswith("hf ")


def test_a_rerun_replaces_the_older_result_and_is_reported(folder, compare):
    new = folder.add("m", ppl=8.0, date=2_000.0)
    old = folder.add("m", ppl=9.0, date=1_000.0)
    out = compare("table", folder.path, "--format", "json")
    assert [r["ppl"] for r in out.json] == [8.0]
    assert f"{new} (1970-01-01 00:33:20 UTC) replaces {old}" in out.err


def test_equal_labels_of_different_checkpoints_become_distinct(folder, compare):
    for family, scheme in (("GGUF", "Q4_0"), ("GGUF", "Q4_1")):
        folder.add("4 bit", family, scheme, 4.5, 8.0)
    out = compare("table", folder.path, "--format", "json")
    assert {r["label"] for r in out.json} == {"4 bit (Q4_0)", "4 bit (Q4_1)"}
    assert "re-run" not in out.err


def test_a_file_given_twice_is_read_once(folder, compare):
    file = folder.add()
    out = compare("table", folder.path, file, file.parent, "--format", "json")
    assert len(out.json) == 1
    assert "re-run" not in out.err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JSON, where=st.sampled_from(
    ["results", "configs", "config", "date", "higher_is_better", "n-samples", "versions", "config.quantization",
     "config.model_args", "config.quantization.label", "configs.wiki2_strided", "configs.wiki2_strided.metadata",
     "results.wiki2_strided", "configs.wiki2_strided.metadata.windows", "config.quantization.notes"]
))  # fmt: skip
def test_junk_in_any_place_is_read_or_refused(tmp_path: Path, junk, where):
    content = result()
    *parents, last = where.split(".")
    target = content
    for parent in parents:
        target = target[parent]
    target[last] = junk
    file = tmp_path / "results_junk.json"
    file.write_text(json.dumps(content))
    reading = read_results([file])
    assert len(reading.records) >= 1 or len(reading.problems) == 1


@pytest.mark.slow
def test_a_file_written_by_the_harness(tmp_path, monkeypatch):
    """lm-eval writes the file: its dummy model on a task of three lines."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"q": q, "gold": 0}) + "\n" for q in "abc"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/docs.jsonl}}, "
        f"cache_dir: {tmp_path}/cache}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['x', 'y']\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 2.0}\n"
    )
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    results = simple_evaluate(
        model="dummy",
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        evaluation_tracker=tracker,
        log_samples=False,
    )
    tracker.save_results_aggregated(results=results, samples=None)
    (record,) = read_results([tmp_path / "out"]).records
    assert (record.task, record.label) == ("tiny", "dummy")
    assert record.metric("acc,none").value == results["results"]["tiny"]["acc,none"]
    assert record.metric("acc,none").higher_is_better is True
    assert record.protocol.fingerprint == ("version 2.0", "3 samples", "0-shot")
    assert record.date == results["date"]


def stock(arguments: object, figure: float = 0.7, **config: object) -> dict:
    """A result of a harness task with a stock model."""
    content = result(quantized=False, task="arc_easy")
    content["results"]["arc_easy"] = {"alias": "arc_easy", "acc,none": figure, "acc_stderr,none": 0.01}
    content["configs"]["arc_easy"] = {"task": "arc_easy", "output_type": "multiple_choice"}
    content["higher_is_better"]["arc_easy"] = {"acc": True}
    content["config"] |= {"model": "hf", "model_args": arguments} | config
    return content


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (
            "pretrained=/train/llama/checkpoint-1000,dtype=bfloat16",
            "pretrained=/train/qwen/checkpoint-1000,dtype=bfloat16",
            {"hf checkpoint-1000 (llama/checkpoint-1000)", "hf checkpoint-1000 (qwen/checkpoint-1000)"},
        ),
        (
            "pretrained=org/pythia,revision=step1000",
            "pretrained=org/pythia,revision=step2000",
            {"hf pythia (revision=step1000)", "hf pythia (revision=step2000)"},
        ),
        ({"pretrained": "org/m"}, {"pretrained": "org/m", "peft": "org/lora"}, {"hf m", "hf m (org/lora)"}),
        (
            {"pretrained": "org/m", "gguf_file": "a.gguf"},
            {"pretrained": "org/m", "gguf_file": "b.gguf"},
            {"hf m (gguf_file=a.gguf)", "hf m (gguf_file=b.gguf)"},
        ),
        ({"pretrained": "org/m"}, {"pretrained": "org/m", "load_in_4bit": True}, {"hf m", "hf m (load_in_4bit=True)"}),
    ],
)
def test_models_that_differ_in_an_argument_are_two_models(folder, compare, first, second, labels):
    folder.write(stock(first, 0.8))
    folder.write(stock(second, 0.6))
    out = compare("table", folder.path, "--metric", "arc_easy/acc", "--format", "json")
    assert {row["label"] for row in out.json} == labels
    assert "re-run" not in out.err


def test_arguments_of_speed_and_a_trailing_slash_make_no_other_model(folder, compare):
    folder.write(stock("pretrained=/m/a,batch_size=1,device=cuda:0", 0.8) | {"date": 1.0})
    folder.write(stock("pretrained=/m/a/,batch_size=8,device=cuda:1", 0.6) | {"date": 2.0})
    out = compare("table", folder.path, "--metric", "arc_easy/acc", "--format", "json")
    assert [row["value"] for row in out.json] == [0.6]
    assert "re-run" in out.err


def test_runs_of_one_model_with_other_shots_are_both_shown(folder, compare):
    for shots in (0, 25):
        content = stock("pretrained=/m/a")
        content["n-shot"]["arc_easy"] = shots
        folder.write(content)
    out = compare("table", folder.path, "--metric", "arc_easy/acc", "--format", "json")
    assert {(row["label"], row["group"]) for row in out.json} == {("hf a (0-shot)", 0), ("hf a (25-shot)", 1)}
    assert "kept apart" in out.err


@pytest.mark.parametrize(
    "name",
    ["Llama-3.3-70B-Instruct-int3-sym-inc", "m-AWQ", "llama-nvfp4", "m-3bit", "m-w4a16", "m-FP8", "m-AutoRound",
     "m-GPTQ-Int4", "m-int4", "m-mxfp4", "m-fp4", "m-2.5bpw", "m-HIGGS", "m-uint4", "m-Q4_0", "m.Q4_K_M.gguf"],
)  # fmt: skip
def test_names_that_indicate_quantization_are_said(folder, name):
    (record,) = read_file(folder.write(stock({"pretrained": f"org/{name}", "dtype": "bfloat16"})))
    assert record.quantization.caveats == (f"{UNSTATED}; quantized by its name",)


@pytest.mark.parametrize("name", ["llama-bf16", "m-fp16", "m-fp32", "mint-8B", "Qwen3-8B", "m-float16"])
def test_other_names_say_nothing_of_the_weights(folder, name):
    (record,) = read_file(folder.write(stock({"pretrained": f"org/{name}", "dtype": "bfloat16"})))
    assert (record.quantization.family, record.quantization.caveats) == ("unknown", (UNSTATED,))


def test_stock_model_is_no_baseline_unless_the_user_says_so(folder, compare):
    folder.write(stock({"pretrained": "org/llama", "dtype": "bfloat16"}, 0.8))
    folder.write(stock({"pretrained": "org/llama-AWQ", "dtype": "float16"}, 0.76))
    options = ("--metric", "arc_easy/acc", "--format")
    out = compare("table", folder.path, *options, "json")
    assert {(r["family"], r["baseline"], r["relative_to_reference"]) for r in out.json} == {("unknown", None, None)}
    assert {row["label"]: row["caveats"] for row in out.json} == {
        "hf llama": [UNSTATED], "hf llama-AWQ": [f"{UNSTATED}; quantized by its name"],
    }  # fmt: skip
    assert "if hf llama is, --baseline LABEL compares the others with it" in out.err
    said = compare("table", folder.path, *options, "json", "--baseline", "HF Llama")
    rows = said.by_label()
    assert rows["hf llama-AWQ"]["relative_to_reference"] == pytest.approx(-0.05)
    assert (rows["hf llama-AWQ"]["baseline"], rows["hf llama-AWQ"]["baseline_by"]) == ("hf llama", "--baseline")
    assert {row["family"] for row in said.json} == {"unknown"}
    assert "looks quantized" not in said.err
    for table_format in ("terminal", "md"):
        text = compare("table", folder.path, *options, table_format, "--baseline", "hf llama").out
        assert "ref. = hf llama (as --baseline says)" in text.replace("\\", "")
        assert UNSTATED in text


def test_baseline_that_looks_quantized_is_warned_of(folder, compare):
    folder.write(stock({"pretrained": "org/llama", "dtype": "bfloat16"}, 0.8))
    folder.write(stock({"pretrained": "org/llama-AWQ", "dtype": "float16"}, 0.76))
    out = compare("table", folder.path, "--metric", "arc_easy/acc", "--baseline", "AWQ")
    assert "warning: the baseline hf llama-AWQ looks quantized" in out.err
    wrong = compare("table", folder.path, "--metric", "arc_easy/acc", "--baseline", "nobody")
    assert (wrong.code, wrong.out) == (1, "")
    assert "--baseline nobody: no model has such a label; labels: hf llama, hf llama-AWQ" in wrong.err


def test_baseline_is_said_to_change_nothing_for_a_divergence(folder, compare):
    write(folder, *divergent("Q4"))
    out = compare("table", folder.path, "--metric", "kld", "--baseline", "Q4", "--format", "json")
    assert out.json[0]["baseline"] is None
    assert "--baseline changes nothing for wiki2_strided/kld" in out.err


def test_baseline_that_the_user_names_goes_before_one_in_full_precision(folder, compare):
    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.0)
    folder.add("Q8", "GGUF", "Q8_0", 8.5, 8.1)
    folder.add("Q4", "GGUF", "Q4_0", 4.5, 8.5)
    assert compare("table", folder.path, "--format", "json").by_label()["Q4"]["baseline"] == "BF16"
    row = compare("table", folder.path, "--format", "json", "--baseline", "Q8").by_label()["Q4"]
    assert (row["baseline"], row["baseline_by"]) == ("Q8", "--baseline")
    assert row["relative_to_reference"] == pytest.approx(8.5 / 8.1 - 1)


@pytest.mark.usefixtures("undrawn")
def test_picture_and_report_say_what_is_unknown_of_the_baseline(folder, compare, tmp_path):
    content = result("base", ppl=8.2, quantized=False)
    content["config"] |= {"model": "hf", "model_args": {"pretrained": "org/base", "dtype": "float32"}}
    folder.write(content)
    folder.add("Q4", "GGUF", "Q4", 4.5, 8.5)
    picture, page = tmp_path / "p.svg", tmp_path / "r.html"
    assert "--baseline draws a model as a line" in compare("plot", folder.path, "-o", picture).err
    comparison = build_comparison(read_results([folder.path]).records, Options(baseline="hf base"))
    said = caption(comparison, arrange(comparison, None))
    assert f"hf base: {UNSTATED}." in said
    assert "Dashed: hf base (as --baseline says)." in said
    assert compare("report", folder.path, "-o", page, "--baseline", "hf base").code == 0
    text = html.unescape(page.read_text())
    assert f'<p class="note">hf base: {UNSTATED}</p>' in text
    assert "ref. = hf base (as --baseline says)" in text


def test_dtype_that_a_stock_model_computes_in_is_kept(folder, compare):
    (record,) = read_file(folder.write(stock({"pretrained": "org/m-HIGGS-x"}, model_dtype="torch.bfloat16")))
    assert (record.quantization.family, record.quantization.dtype) == ("unknown", "bfloat16")


def test_fewer_elements_than_the_name_says_indicate_quantization(folder):
    arguments = {"pretrained": "org/Llama-3.3-70B", "dtype": "bfloat16"}
    (packed,) = read_file(folder.write(stock(arguments, model_num_parameters=11e9)))
    (whole,) = read_file(folder.write(stock(arguments, model_num_parameters=70.6e9)))
    assert (packed.quantization.looks_quantized, whole.quantization.looks_quantized) == (True, False)


def lambada(name: str, perplexity: object, accuracy: float, arc: float = 0.5) -> dict:
    content = stock({"pretrained": f"org/{name}", "dtype": "auto"}, arc)
    content["results"]["lambada"] = {"perplexity,none": perplexity, "perplexity_stderr,none": perplexity,
                                     "acc,none": accuracy, "acc_stderr,none": 0.0}  # fmt: skip
    content["configs"]["lambada"] = {"task": "lambada", "output_type": "loglikelihood"}
    for key in ("versions", "n-shot", "n-samples"):
        content[key]["lambada"] = content[key]["arc_easy"]
    content["higher_is_better"]["lambada"] = {"perplexity": False, "acc": True}
    return content


@pytest.mark.parametrize("broken", [float("nan"), "nan", "NaN"])
def test_nan_perplexity_takes_the_accuracy_of_its_task_and_marks_the_model_in_all(folder, compare, broken):
    folder.write(lambada("good", 4.1, 0.64))
    folder.write(lambada("bad", broken, 1.0, arc=0.9))
    separate = stock({"pretrained": "org/bad", "dtype": "auto"}, 0.9)
    separate["results"] = {"piqa": separate["results"]["arc_easy"]}
    separate["configs"] = {"piqa": separate["configs"]["arc_easy"]}
    for key in ("versions", "n-shot", "n-samples", "higher_is_better"):
        separate[key]["piqa"] = separate[key].pop("arc_easy")
    folder.write(separate)
    own = compare("table", folder.path, "--metric", "lambada/acc", "--sort", "metric", "--format", "json")
    assert [(row["label"], row["value"]) for row in own.json] == [("hf good", 0.64), ("hf bad", None)]
    for task in ("lambada", "arc_easy", "piqa"):
        out = compare("table", folder.path, "--metric", f"{task}/acc", "--format", "json")
        assert out.by_label()["hf bad"]["not_numbers"] == ["lambada/perplexity"]
        assert "hf bad: not a finite number: lambada/perplexity" in out.err
        assert "hf good: not" not in out.err
    assert "lambada/perplexity" in compare("table", folder.path, "--metric", "arc_easy/acc", "--format", "md").out


def test_infinite_figure_marks_the_model_and_keeps_its_others(folder, compare):
    folder.write(lambada("bad", float("inf"), 0.3))
    out = compare("table", folder.path, "--metric", "lambada/acc", "--format", "json")
    assert [(row["value"], row["not_numbers"]) for row in out.json] == [(0.3, ["lambada/perplexity"])]


def test_model_with_a_nan_figure_is_never_the_best(folder, compare):
    for label, accuracy, nan in (("good", 0.6, 0), ("bad", 0.9, 3)):
        content = result(label, "GGUF", label, 4.0)
        content["results"]["wiki2_strided"]["acc,none"] = accuracy
        content["higher_is_better"]["wiki2_strided"]["acc"] = True
        content["config"]["quantization"]["nan_loglikelihoods"] = nan
        folder.write(content)
    options = ("--metric", "acc", "--pareto", "--budget", "24", "--context", "1024", "--format", "json")
    out = compare("table", folder.path, *options)
    assert {label: row["pareto"] for label, row in out.by_label().items()} == {"good": True, "bad": False}
    assert "bad: not a finite number: 3 log-likelihoods" in out.err
    assert ": good, accuracy 0.6" in out.err
