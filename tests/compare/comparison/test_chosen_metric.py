"""Any task of the harness: groups and subtasks, filters, directions, several metrics, their mean."""

from __future__ import annotations

import csv
import io
import json
import math
import struct

import pytest

from compare.comparison.mean import mean
from compare.results.reading import read_file, read_results
from compare.results.records import MetricValue
from tests.compare.conftest import result
from tests.compare.harness_files import SUBTASKS, fill, suite
from tests.conftest import simple_evaluate

ACC, MATCH = ("--metric", "mmlu/acc"), ("--metric", "gsm8k/exact_match,strict-match")
NORM = ("--metric", "hellaswag/acc_norm")


def write_tasks(folder) -> None:
    """Writes tasks over one local file: a group in a group, the outer name first, and a group without figures."""
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps({"q": q, "gold": i % 2}) + "\n" for i, q in enumerate("abcdefg")))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {docs}}}, cache_dir: {folder}/cache}}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\nmetadata: {version: 2.0}\n"
    )
    choice = "output_type: multiple_choice\ndoc_to_choice: ['x', 'y']\n"
    choice += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    generate = "output_type: generate_until\ngeneration_kwargs: {until: ['.']}\n"
    generate += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nfilter_list:\n"
    generate += "".join(f"  - {{name: {n}, filter: [{{function: take_first}}]}}\n" for n in ("strict", "flexible"))
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 2}\n"
    for name in ("zoo_algebra", "zoo_physics", "zoo_law"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntask_alias: {name[4:]}\n{choice}{common}")
    (folder / "words.yaml").write_text(f"task: words\n{generate}{common}")
    for name, children in (("zoo_stem", "zoo_algebra, zoo_physics"), ("zoo_other", "zoo_law")):
        (folder / f"{name}.yaml").write_text(f"group: {name}\ngroup_alias: {name[4:]}\ntask: [{children}]\n{aggregate}")
    (folder / "zoo.yaml").write_text(f"group: zoo\ntask: [zoo_stem, zoo_other]\n{aggregate}")
    (folder / "bag.yaml").write_text("group: bag\ntask: [words]\nmetadata: {version: 2}\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A result file written by lm-eval: its dummy model on groups, limited to 5 of 7 documents."""
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder / "hf"))
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager

        tracker = EvaluationTracker(output_path=str(folder / "out"))
        results = simple_evaluate(
            model="dummy",
            tasks=["zoo", "bag"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            evaluation_tracker=tracker,
            log_samples=False,
            limit=5,
        )
        tracker.save_results_aggregated(results=results, samples=None)
    (file,) = (folder / "out").rglob("results_*.json")
    return file


@pytest.mark.slow
def test_groups_of_a_harness_file_take_missing_values_from_subtasks(written):
    """The harness leaves out values of a group; once it no longer does, compare/results/groups.py may be obsolete."""
    content = json.loads(written.read_text())
    assert "zoo" not in content["higher_is_better"], "lm-eval 0.4.13: the outer group comes before the inner ones"
    assert "zoo" not in content["n-samples"]
    records = {record.task: record for record in read_file(written)}
    assert set(records) == {"zoo", "zoo_stem", "zoo_other", "zoo_algebra", "zoo_physics", "zoo_law", "words"}
    zoo = records["zoo"]
    assert zoo.metric("acc,none").higher_is_better is True
    assert zoo.metric("acc,none").value == content["results"]["zoo"]["acc,none"]
    assert zoo.protocol.harness == ("version 2", "15 samples", "0-shot", "3 subtasks")
    assert records["zoo_law"].protocol.harness == ("version 2.0", "5 samples", "0-shot")
    assert records["zoo_stem"].alias == "stem"


def test_simulated_files_have_the_structure_of_harness_files(written):
    """Compares `harness_files` with a real file: the same keys at the top, in a task, in a group."""
    real, ours = json.loads(written.read_text()), suite()
    assert set(ours) <= set(real)
    assert set(ours["results"]["mmlu"]) == set(real["results"]["zoo"])
    assert set(ours["results"]["mmlu_virology"]) == set(real["results"]["zoo_law"])
    assert set(ours["n-samples"]["gsm8k"]) == set(real["n-samples"]["words"])
    for key in ("groups", "n-samples", "higher_is_better", "n-shot"):
        inner, outer = ("mmlu_stem" in ours[key], "mmlu" in ours[key])
        assert (inner, outer) == ("zoo_stem" in real[key], "zoo" in real[key]), key


def test_subtasks_of_a_harness_file(written, compare):
    out = compare("table", written, "--metric", "zoo/acc", "--subtasks", "--format", "json")
    assert [r["task"] for r in out.json] == ["zoo_stem", "zoo_other"]
    bag = compare("table", written, "--metric", "bag/exact_match", "--subtasks", "--format", "json")
    assert [(r["task"], r["metric"]) for r in bag.json] == [("words", "exact_match,strict")], "the task's first filter"


@pytest.mark.parametrize(
    ("asked", "task", "metric", "value"),
    [
        ("mmlu/acc", "mmlu", "acc,none", None),
        ("mmlu_stem/acc", "mmlu_stem", "acc,none", None),
        ("stem/acc", "mmlu_stem", "acc,none", None),  # as the harness' own table names it
        ("hellaswag/acc_norm", "hellaswag", "acc_norm,none", 0.75),
        ("gsm8k/exact_match", "gsm8k", "exact_match,strict-match", 0.55),
        ("gsm8k/exact_match,flexible-extract", "gsm8k", "exact_match,flexible-extract", 0.58),
        ("word_perplexity", "wikitext", "word_perplexity,none", 9.5),
    ],
)
def test_metric_names_with_task_filter_or_alias(folder, compare, asked, task, metric, value):
    content = suite("m")
    folder.write(content)
    (row,) = compare("table", folder.path, "--metric", asked, "--format", "json").json
    assert (row["task"], row["metric"]) == (task, metric)
    assert row["value"] == (content["results"][task][metric] if value is None else pytest.approx(value))
    assert row["higher_is_better"] is (task != "wikitext")


def test_a_group_with_another_limit_is_kept_apart(folder, compare):
    """The group's own entry has no n-samples, so those of its subtasks count."""
    for label in ("a", "b"):
        folder.write(suite(label, tasks=("mmlu",)))
    folder.write(suite("few", tasks=("mmlu",), limit=50))
    rows = compare("table", folder.path, *ACC, "--format", "json").by_label()
    assert {label: row["comparable"] for label, row in rows.items()} == {"a": True, "b": True, "few": False}


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "{{ messages }}"},
        {"system_instruction": "Think.", "system_instruction_sha": "ab" * 32},
    ],
)
def test_results_with_other_prompts_are_kept_apart(folder, compare, change):
    for label in ("a", "b"):
        folder.write(suite(label))
    folder.write(suite("c") | change)
    rows = compare("table", folder.path, *MATCH, "--format", "json").by_label()
    assert {label: row["comparable"] for label, row in rows.items()} == {"a": True, "b": True, "c": False}


def test_generation_arguments_separate_only_generation_tasks(folder, compare):
    for label in ("a", "b", "c"):
        content = suite(label)
        content["config"]["gen_kwargs"] = {"max_gen_toks": 8} if label == "c" else {}
        folder.write(content)
    assert not compare("table", folder.path, *MATCH, "--format", "json").by_label()["c"]["comparable"]
    assert compare("table", folder.path, *NORM, "--format", "json").by_label()["c"]["comparable"]


def test_generation_arguments_separate_groups_of_generation_tasks(folder, compare):
    """As in bbh: a group has no output type, but its subtasks have."""
    for label in ("a", "b", "c"):
        content = suite(label, tasks=("mmlu",))
        for config in content["configs"].values():
            config["output_type"] = "generate_until"
        content["config"]["gen_kwargs"] = {"temperature": 1} if label == "c" else {}
        folder.write(content)
    rows = compare("table", folder.path, *ACC, "--format", "json").by_label()
    assert {label: row["comparable"] for label, row in rows.items()} == {"a": True, "b": True, "c": False}


def test_results_with_another_bos_rule_are_kept_apart(folder, compare):
    for label in ("a", "b", "c"):
        content = suite(label)
        content["config"]["quantization"]["bos"] = {"add_bos_token": False if label == "c" else None}
        folder.write(content)
    assert not compare("table", folder.path, *NORM, "--format", "json").by_label()["c"]["comparable"]


@pytest.mark.parametrize(
    ("metric", "best", "order"), [("mmlu/acc", "good", ["good", "bad"]), ("word_perplexity", "bad", ["bad", "good"])]
)
def test_pareto_budget_and_order_follow_the_direction_in_the_file(folder, compare, metric, best, order):
    """Two models whose perplexities contradict their accuracies, so that the direction decides."""
    for label, quality, perplexity in (("bad", 0.6, 8.0), ("good", 1.0, 20.0)):
        content = suite(label, bpw=4.0, quality=quality)
        content["results"]["wikitext"]["word_perplexity,none"] = perplexity
        folder.write(content)
    out = compare("table", folder.path, "--metric", metric, "--pareto", "--budget", 80, "--context", 1, "--sort",
                  "metric", "--format", "json")  # fmt: skip
    assert [row["label"] for row in out.json] == order
    assert {row["label"]: row["pareto"] for row in out.json} == {"good": best == "good", "bad": best == "bad"}
    assert f"of context: {best}," in out.err


def test_contradicting_directions_are_unknown_and_reported(folder, compare):
    for label, higher in (("a", True), ("b", False)):
        content = suite(label)
        content["higher_is_better"]["hellaswag"]["acc_norm"] = higher
        folder.write(content)
    out = compare("table", folder.path, *NORM, "--format", "json")
    assert [row["higher_is_better"] for row in out.json] == [None, None]
    assert "some files say that higher is better, others lower" in out.err


# ------------------------------------------------------------------ several metrics


def test_table_of_several_metrics_has_a_section_for_each(folder, compare):
    fill(folder)
    out = compare("table", folder.path, *ACC, *MATCH, "--format", "json")
    assert {row["task"] for row in out.json} == {"mmlu", "gsm8k"}
    assert len(out.json) == 16
    text = compare("table", folder.path, *ACC, *MATCH).out
    assert text.index("mmlu, version 2, 1450 samples, 5-shot, 9 subtasks") < text.index("gsm8k, version 3.0, 1319")
    rows = list(csv.DictReader(io.StringIO(compare("table", folder.path, *ACC, *MATCH, "--format", "csv").out)))
    assert [row["task"] for row in rows] == ["mmlu"] * 8 + ["gsm8k"] * 8


@pytest.mark.slow
def test_plot_of_several_metrics_has_a_panel_for_each(folder, compare, tmp_path):
    fill(folder)
    metrics = (*ACC, *MATCH, *NORM, "--metric", "wikitext/word_perplexity")
    out = compare("plot", folder.path, *metrics, "--pareto", "-o", tmp_path / "a.png")
    assert out.code == 0
    assert "28 points, 4 reference lines, 4 panels" in out.err
    assert struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]) == (2400, 2090)


@pytest.mark.slow
def test_panels_are_described_and_drawn_alike_each_time(folder, compare, tmp_path):
    fill(folder)
    for target in ("a.svg", "b.svg"):
        assert compare("plot", folder.path, *MATCH, "--metric", "word_perplexity", "-o", tmp_path / target).code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    description = (tmp_path / "a.svg").read_text().split("<dc:description>")[1].split("</dc:description>")[0]
    assert "wikitext/word_perplexity: Word perplexity against Bits per weight" in description
    assert "EXL3 3.0bpw: 3.03, 10.1064" in description


def panels_of(folder, *metrics, **options):
    """The figure of several metrics, in which every point has a label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from compare.comparison.build import build_comparisons
    from compare.comparison.comparison import Options
    from compare.plot import style
    from compare.plot.figure import style_sheet
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures.panels import PanelGrid
    from compare.plot.series import arrange

    comparisons = build_comparisons(read_results([folder.path]).records, Options(metrics=metrics, **options))
    picture = PanelGrid([(comparison, arrange(comparison, False)) for comparison in comparisons], PlotSettings())
    with style_sheet(style.LIGHT):
        figure = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(figure)
        picture.draw(figure, PlotSettings(), pytest.fail)
        figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        (5, {"axis": "memory", "budget": 4.5, "context": 4096}),
    ],
)
def test_panels_and_texts_do_not_overlap(folder, count, options):
    """Measures the drawn axes, with their tick and axis labels, and every text of the figure."""
    fill(folder)
    metrics = ("mmlu/acc", "gsm8k/exact_match", "hellaswag/acc", "hellaswag/acc_norm", "wikitext/bits_per_byte")
    figure = panels_of(folder, *metrics[:count], **options)
    assert len(figure.axes) == count
    boxes = [ax.get_tightbbox() for ax in figure.axes] + [text.get_window_extent() for text in figure.texts]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    meeting = [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j and a.overlaps(b)]
    assert meeting == []
    inside = [b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes]
    assert all(inside)
    labels = [text.get_text() for text in figure.texts]
    assert "gsm8k/exact_match,strict-match" in labels
    assert "8 models" in labels


def test_too_many_panels_are_refused(folder, compare, tmp_path):
    content = suite(tasks=("hellaswag",))
    for number in range(13):
        content["results"]["hellaswag"][f"m{number},none"] = 0.5
    folder.write(content)
    metrics = [word for number in range(13) for word in ("--metric", f"m{number}")]
    out = compare("plot", folder.path, *metrics, "-o", tmp_path / "p.png")
    assert out.code == 1
    assert "13 metrics are more than one picture can show (12)" in out.err.splitlines()[-1]


@pytest.mark.usefixtures("undrawn")
def test_a_metric_without_drawable_points_is_reported(folder, compare, tmp_path):
    content = suite()
    content["results"]["hellaswag"]["acc_norm,none"] = None
    folder.write(content)
    out = compare("plot", folder.path, *ACC, *NORM, "-o", tmp_path / "p.png")
    assert out.code == 0
    assert "hellaswag/acc_norm: not drawn: model: normalized accuracy is not a finite number" in out.err
    assert "wrote" in out.err.splitlines()[-1]


@pytest.mark.slow
def test_plot_page_and_report_of_several_metrics(folder, compare, tmp_path):
    import xml.etree.ElementTree as ElementTree

    fill(folder)
    assert compare("plot", folder.path, *ACC, *MATCH, "-o", tmp_path / "p.html").code == 0
    page = (tmp_path / "p.html").read_text()
    assert page.count("<figure") == 2
    assert compare("report", folder.path, *ACC, *MATCH, "-o", tmp_path / "r.html").code == 0
    report = (tmp_path / "r.html").read_text()
    assert report.count("<figure") == 4, "two metrics on two axes"
    assert report.count("<table") == 2
    assert "--tasks mmlu" in report
    assert "--tasks gsm8k" in report
    for text in (page, report):
        ids = [e.get("id") for svg in text.split("<svg")[1:] for e in
               ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>").iter() if e.get("id")]  # fmt: skip
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--subtasks"], "name it: --metric GROUP/METRIC"),
        (["--metric", "gsm8k/exact_match", "--subtasks"], "expected GROUP/METRIC; groups: mmlu, mmlu_humanities"),
        (["--metric", "mmlu/f1", "--subtasks"], "no subtask of mmlu has f1"),
        (["--metric", "mmlu/acc", "--mean"], "--mean needs at least two metrics"),
        (["--metric", "mmlu/acc", "--metric", "word_perplexity", "--mean"], "different direction"),
        (["--metric", "bits_per_byte", "--metric", "word_perplexity", "--mean"], "different scales"),
        (["--metric", "mmlu/acc", "--metric", "mmlu_stem/acc", "--mean"], "both contain mmlu_abstract_algebra"),
        (["--metric", "hellaswag/acc", "--metric", "hellaswag/acc_norm", "--mean"], "both contain hellaswag"),
    ],
)
def test_invalid_metric_requests_give_one_line(folder, compare, arguments, words):
    folder.write(suite())
    out = compare("table", folder.path, *arguments)
    assert out.code in (1, 2)
    assert words in out.err.splitlines()[-1]
    assert out.out == ""


# ------------------------------------------------------------------ the mean


def test_mean_worked_by_hand():
    figure = mean([MetricValue(0.4, 0.03), MetricValue(0.6, 0.04), MetricValue(0.8, 0.12)])
    assert figure.value == pytest.approx(0.6, rel=1e-15)
    assert figure.stderr == pytest.approx(0.13 / 3, rel=1e-15)  # √(9 + 16 + 144) = 13
    assert mean([MetricValue(0.4, 0.03), MetricValue(0.6)]) == MetricValue(0.5, None), (
        "an error that is missing is not zero"
    )
    assert mean([MetricValue(0.4, 0.03), MetricValue(None, 0.04)]) == MetricValue(None, None)


def test_mean_of_tasks_names_its_tasks(folder, compare, tmp_path):
    fill(folder)
    out = compare("table", folder.path, *ACC, *MATCH, *NORM, "--mean", "--format", "json")
    row = out.by_label()["EXL3 4.0bpw"]
    assert row["averaged"] == ["mmlu/acc", "gsm8k/exact_match,strict-match", "hellaswag/acc_norm"]
    values = [row["tasks"][name]["value"] for name in row["averaged"]]
    errors = [row["tasks"][name]["stderr"] for name in row["averaged"]]
    assert row["value"] == pytest.approx(sum(values) / 3)
    assert row["stderr"] == pytest.approx(math.hypot(*errors) / 3)
    assert row["comparable"]
    assert "mean over 3 tasks: mmlu/acc, gsm8k/exact_match,strict-match, hellaswag/acc_norm" in out.err
    assert "left out" not in out.err
    svg = tmp_path / "p.svg"
    compare("plot", folder.path, *ACC, *MATCH, *NORM, "--mean", "-o", svg)
    assert "Mean of 3 tasks" in svg.read_text()
    text = compare("table", folder.path, *ACC, *MATCH, *NORM, "--mean", "--format", "md").out
    assert "over mmlu/acc, gsm8k/exact\\_match,strict-match, hellaswag/acc\\_norm, each counting alike" in text
    assert "| Mean of 3 tasks | mmlu/acc | gsm8k/exact\\_match,strict-match |" in text


def test_mean_of_subtasks_is_not_the_group(folder, compare):
    """The mean weighs all subtasks equally; the harness' group weighs them by their samples."""
    content = suite("m", tasks=("mmlu",))
    folder.write(content)
    out = compare("table", folder.path, *ACC, "--subtasks", "--mean", "--format", "json")
    groups = [content["results"][name]["acc,none"] for name in SUBTASKS]
    assert out.json[0]["value"] == pytest.approx(sum(groups) / 4)
    assert out.json[0]["value"] != pytest.approx(content["results"]["mmlu"]["acc,none"], rel=1e-6)


def test_a_task_that_one_model_lacks_is_left_out_of_the_mean_and_named(folder, compare):
    fill(folder)
    folder.write(suite("late", "EXL2", 4.2, 0.97, tasks=("mmlu", "gsm8k")))
    out = compare("table", folder.path, *ACC, *MATCH, *NORM, "--mean", "--format", "json")
    assert "left out of the mean: hellaswag/acc_norm: not in late" in out.err
    rows = out.by_label()
    assert rows["late"]["averaged"] == ["mmlu/acc", "gsm8k/exact_match,strict-match"]
    assert rows["late"]["tasks"]["hellaswag/acc_norm"] == {"value": None, "stderr": None}
    assert rows["BF16"]["tasks"]["hellaswag/acc_norm"]["value"] == pytest.approx(0.75), "still in the table"
    assert rows["BF16"]["value"] == pytest.approx(
        (rows["BF16"]["tasks"]["mmlu/acc"]["value"] + 0.55) / 2
    )  # fmt: skip
    assert "hellaswag/acc_norm (not in the mean)" in compare("table", folder.path, *ACC, *MATCH, *NORM, "--mean").out
    masked = compare("table", folder.path, *ACC, *MATCH, *NORM, "--mean", "--mask", "bpw;BF16", "--format", "json")
    assert len(masked.json[0]["averaged"]) == 3


def test_models_without_any_of_the_tasks_do_not_limit_the_mean(folder, compare):
    fill(folder)
    folder.add("perplexity only", "GGUF", "x", 4.0, 9.0)
    out = compare("table", folder.path, *ACC, *MATCH, "--mean", "--format", "json")
    assert len(out.json) == 8
    assert "left out" not in out.err


def test_mean_without_common_tasks_is_refused(folder, compare):
    folder.write(suite("a", tasks=("mmlu",)))
    folder.write(suite("b", tasks=("gsm8k",)))
    out = compare("table", folder.path, *ACC, *MATCH, "--mean")
    assert out.code == 2
    assert "none is in every model's results" in out.err


def test_a_missing_standard_error_makes_that_of_the_mean_null(folder, compare):
    for label, stderr in (("a", 0.01), ("b", "N/A")):
        content = suite(label)
        content["results"]["hellaswag"]["acc_norm_stderr,none"] = stderr
        folder.write(content)
    rows = compare("table", folder.path, *ACC, *NORM, "--mean", "--format", "json").by_label()
    assert rows["a"]["stderr"] > 0
    assert rows["b"]["stderr"] is None
    assert rows["b"]["value"] == pytest.approx(rows["a"]["value"])


@pytest.mark.usefixtures("undrawn")
def test_a_null_figure_makes_the_mean_null_and_is_not_drawn(folder, compare, tmp_path):
    fill(folder)
    content = suite("nan", "GGUF", 3.3)
    content["results"]["hellaswag"]["acc_norm,none"] = float("nan")
    folder.write(content)
    assert compare("table", folder.path, *ACC, *NORM, "--mean", "--format", "json").by_label()["nan"]["value"] is None
    out = compare("plot", folder.path, *ACC, *NORM, "--mean", "-o", tmp_path / "p.png")
    assert "not drawn: nan: mean of 2 tasks is not a finite number" in out.err


def test_means_over_other_samples_are_kept_apart(folder, compare):
    for label in ("a", "b"):
        folder.write(suite(label))
    folder.write(suite("few", limit=20))
    rows = compare("table", folder.path, *ACC, *MATCH, "--mean", "--format", "json").by_label()
    assert {label: row["comparable"] for label, row in rows.items()} == {"a": True, "b": True, "few": False}


@pytest.mark.usefixtures("undrawn")
def test_mean_joins_separate_runs_of_one_model(folder, compare, tmp_path):
    """One file per task, as people often evaluate; the report gives a command for each run."""
    for label, bpw in (("a", 4.0), ("b", 5.0)):
        for task in ("mmlu", "gsm8k"):
            folder.write(suite(label, bpw=bpw, tasks=(task,)))
    out = compare("table", folder.path, *ACC, *MATCH, "--mean", "--format", "json")
    assert [row["label"] for row in out.json] == ["a", "b"]
    compare("report", folder.path, *ACC, *MATCH, "--mean", "-o", tmp_path / "r.html")
    report = (tmp_path / "r.html").read_text()
    assert report.count('<article class="run">') == 4
    assert "--tasks gsm8k" in report
    assert "Mean over" in report


def test_models_with_equal_labels_get_the_same_distinct_labels_in_all_tasks(folder, compare):
    for scheme in ("Q4_0", "Q4_1"):
        folder.write(suite("4 bit", scheme=scheme))
    rows = compare("table", folder.path, *ACC, *MATCH, "--mean", "--format", "json").by_label()
    assert set(rows) == {"4 bit (Q4_0)", "4 bit (Q4_1)"}


def test_csv_of_a_mean_has_a_column_per_task(folder, compare):
    fill(folder)
    rows = list(
        csv.DictReader(io.StringIO(compare("table", folder.path, *ACC, *MATCH, "--mean", "--format", "csv").out))
    )
    assert float(rows[0]["gsm8k/exact_match,strict-match"]) == pytest.approx(0.55)
    assert float(rows[0]["mmlu/acc stderr"]) > 0
    assert rows[0]["averaged"] == "mmlu/acc; gsm8k/exact_match,strict-match"


@pytest.mark.usefixtures("undrawn")
def test_window_tasks_and_harness_tasks_in_one_picture(folder, compare, tmp_path):
    for label, bpw in (("a", 4.0), ("b", 5.0)):
        folder.write(suite(label, bpw=bpw, scheme="s"))
        folder.write(result(label, "GGUF", "s", bpw, 9.0 - bpw / 5))
    out = compare("plot", folder.path, *ACC, "--metric", "wiki2_strided/token_perplexity", "-o", tmp_path / "p.png")
    assert out.code == 0
    assert "2 panels" in out.err
    assert compare("table", folder.path, "--format", "json").json[0]["metric"] == "token_perplexity,none"


@pytest.mark.parametrize("tree", [{"a": ["b"], "b": ["a"]}, {"a": ["a"]}, {"a": [1, None]}, {"a": "b"}, [1], None])
def test_circular_and_malformed_group_trees_do_not_crash(folder, compare, tree):
    content = suite("m", tasks=("hellaswag",))
    content["results"]["a"] = {"acc,none": 0.5}
    content["group_subtasks"] = tree
    folder.write(content)
    assert compare("table", folder.path, "--metric", "a/acc").code == 0
    assert compare("table", folder.path, "--metric", "a/acc", "--subtasks").code in (0, 1, 2)


@pytest.mark.usefixtures("undrawn")
def test_figures_from_nan_loglikelihoods_are_null_and_reported(folder, compare, tmp_path):
    """The harness picks the first of NaN choices as the model's; the adapter counts them in the result file."""
    folder.write(suite("sound", bpw=4.0))
    folder.write(suite("nan", bpw=5.0, nan_loglikelihoods=7, notes=["7 of 400 log-likelihoods are NaN"]))
    for metric, value in (("mmlu/acc", None), ("hellaswag/acc", None), ("word_perplexity", None), (MATCH[1], 0.55)):
        rows = compare("table", folder.path, "--metric", metric, "--format", "json").by_label()
        assert rows["nan"]["value"] == (value and pytest.approx(value)), metric
        assert rows["nan"]["stderr"] is None or value
        assert rows["sound"]["value"] is not None
        assert "7 of 400" in rows["nan"]["notes"][0]
    out = compare("plot", folder.path, *ACC, "-o", tmp_path / "p.png")
    assert "not drawn: nan: accuracy is not a finite number" in out.err
    windows = result("nan", nan_loglikelihoods=7)
    folder.write(windows)
    assert compare("table", folder.path, "--format", "json").json[0]["value"] == 8.5, "a window task checks for itself"
