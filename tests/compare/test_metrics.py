"""The metric table: what this project's tasks emit has a row, and a row is enough for table, plot and noise floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.metrics import KLD, METRICS, Metric, beside_kld, formula_of, metric_named, needs_reference
from compare.plot.captions import y_label
from compare.plot.series import arrange
from compare.results.reading import read_results
from tests.compare.divergence_files import TASK, divergent, write

RESULTS = Path(__file__).parents[2] / "docs" / "results"
OUR_TASKS = ("wiki2_", "sample_", "text_")


def _own_tasks():
    """Task and content of each result of this project's tasks in docs/results."""
    for file in sorted(RESULTS.rglob("results_*.json")):
        content = json.loads(file.read_text())
        for task in content["results"]:
            if task.startswith(OUR_TASKS):
                yield task, content


def test_every_metric_of_our_tasks_has_a_row_with_the_direction_they_state():
    from lmeval_ext.tasks.perplexity import PerplexityTask

    task = object.__new__(PerplexityTask)
    names = {name for name in task.aggregation() if not name.endswith("_stderr")}
    assert names <= METRICS.keys()
    directions = {name: METRICS[name].higher_is_better for name in names}
    assert task.higher_is_better() == {name: higher for name, higher in directions.items() if higher is not None}


def test_every_metric_of_the_stored_results_has_a_row_with_its_direction():
    seen = set()
    for task, content in _own_tasks():
        for key in content["results"][task]:
            name = key.partition(",")[0]
            if "," in key and not name.endswith("_stderr"):
                seen.add(name)
        for name, higher in content["higher_is_better"][task].items():
            assert METRICS[name].higher_is_better == higher, name
    assert {"token_perplexity", "top1_accuracy", KLD, "ppl_ratio", "kld_p999"} <= seen <= METRICS.keys()


def test_every_sum_of_a_window_divergence_has_a_row_that_forms_it():
    from lmeval_ext.divergence import summary
    from tests.divergence.test_summary import made

    assert tuple(made()[0].sums()) == summary.MEANS
    assert all(METRICS[name].formula is not None for name in summary.MEANS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_rows_are_complete(metric):
    assert METRICS[metric.name] is metric
    assert (metric.formula is None) == (metric.percent is not None), "a figure is formed from sums, or is a quantile"
    assert metric.ideal is not None or metric.name == "first_divergence", "the first of none is at no token"
    assert not metric.column or metric.needs_reference, "a column beside the KL divergence compares with its reference"
    assert metric.higher_is_better is not None or metric.two_sided, "without a direction the best value is in between"


@pytest.mark.parametrize(
    ("name", "rolling", "expected"),
    [
        ("token_perplexity", False, np.exp(6 / 4)),
        ("ppl_ratio", False, np.exp(6 / 4)),
        ("rms_delta_p", False, np.sqrt(6 / 4)),
        ("bits_per_byte", False, 6 / 4 / np.log(2)),
        ("bits_per_byte", True, -6 / 4 / np.log(2)),
        ("perplexity", False, np.exp(-6 / 4)),
        ("word_perplexity", True, np.exp(-6 / 4)),
        ("word_perplexity", False, 6 / 4),
        ("other_perplexity", True, np.exp(-6 / 4)),
        ("other_perplexity", False, 6 / 4),
        ("acc", False, 6 / 4),
        ("unheard_of", True, 6 / 4),
    ],
)
def test_formulas(name, rolling, expected):
    assert formula_of(name, rolling)(np.array([6.0]), np.array([4.0])) == pytest.approx([expected])


@pytest.mark.parametrize("name", ["kld_median", "kld_max", "kld_without_a_row"])
def test_quantiles_are_not_formed_from_sums(name):
    with pytest.raises(ValueError, match="is not formed from sums"):
        formula_of(name, False)


def test_a_metric_without_a_row_has_only_what_its_name_tells():
    metric = metric_named("f1")
    assert (metric.title_with_unit, metric.higher_is_better, metric.needs_reference) == ("f1", None, False)
    assert metric_named("other_perplexity").higher_is_better is False
    assert needs_reference("kld_p50")
    assert metric_named("kld_p50").ideal == 0


TOY = {
    "one-sided": (Metric("toy", "Toy distance", False, 2.0, "bits", needs_reference=True, column="Toy"), 2.0, 2.5),
    "one-sided, higher is better": (
        Metric("toy", "Toy distance", True, 2.0, "bits", needs_reference=True, column="Toy"), 1.5, 2.0,
    ),
    "two-sided": (
        Metric("toy", "Toy distance", False, 2.0, "bits", two_sided=True, needs_reference=True, column="Toy"), 1.5, 2.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOY)
def test_a_new_row_is_enough_for_table_plot_and_noise_floor(folder, compare, monkeypatch, case):
    metric, low, high = TOY[case]
    monkeypatch.setitem(METRICS, "toy", metric)
    for label, family, role, value in (
        ("BF16", "full precision", "reference", 2.5 if high > 2 else 1.5),
        ("Q4", "GGUF", "comparison", 7.25),
    ):
        content, _ = divergent(label, family, 4.0, role=role)
        content["results"][TASK]["toy,none"] = value  # without a direction in the file
        write(folder, content)

    comparison = build_comparison(read_results([folder.path]).records, Options(metrics=("toy",)))
    floor = comparison.noise_floor
    assert floor is not None
    assert (floor.low, floor.high) == (low, high)
    assert comparison.metric.higher_is_better is metric.higher_is_better
    better = "higher is better" if metric.higher_is_better else "lower is better"
    assert y_label(comparison) == f"Toy distance (bits; {better})"
    assert [point.record.label for point in arrange(comparison, None).points] == ["Q4"]

    own = compare("table", folder.path, "--metric", "toy", "--format", "md").out
    assert "| Toy distance (bits) |" in own
    beside = compare("table", folder.path, "--metric", "kld", "--format", "md").out
    assert "| Toy |" in beside
    assert "| 7.2500 |" in beside
    fields = compare("table", folder.path, "--metric", "kld", "--format", "json").by_label()
    assert fields["Q4"]["toy"] == 7.25
    assert metric in beside_kld()
