"""The chosen answer follows from what the harness logs: its own tasks, aggregation and files, with its dummy model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compare.results.chosen_answer import chosen_answer
from compare.results.reading import read_file
from compare.results.samples import read_samples

CHOICES = ["a", "bb ccc", "dddd é", "e"]


def loglikelihoods(values: list[float]) -> list[list[str]]:
    return [[str(value), "False"] for value in values]


def arguments(choices: list[str]) -> dict[str, Any]:
    return {f"gen_args_{i}": {"arg_0": "q", "arg_1": f" {text}"} for i, text in enumerate(choices)}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("acc", "0"), ("acc_norm", "1"), ("acc_bytes", "2"), ("exact_match", None), ("acc_mutual_info", None)],
)
def test_each_accuracy_has_its_own_choice(metric, expected):
    """Log-likelihoods −3, −4, −4.6: the first; per character −3, −2, −2.3: the second; per byte −1.5, −2, −1.15."""
    line = {"filtered_resps": loglikelihoods([-3.0, -4.0, -4.6]), "arguments": arguments(["é"[:1], "bb", "éé"])}
    assert chosen_answer(line, metric, 0.0) == expected


def test_older_arguments_are_lists():
    line = {"filtered_resps": loglikelihoods([-3.0, -4.0]), "arguments": [["q", " a"], ["q", " bbbb"]]}
    assert chosen_answer(line, "acc_norm", 1.0) == "1"
    assert chosen_answer({**line, "arguments": [["q"], ["q"]]}, "acc_norm", 1.0) is None
    assert chosen_answer({**line, "arguments": []}, "acc", 1.0) == "0", "the choices' texts are not needed"


@pytest.mark.parametrize(
    ("target", "figure", "expected"),
    [("0", 1.0, "0"), ("0", 0.0, None), ("1", 1.0, None), ("[1, 0]", 1.0, "0"), ("[1]", 1.0, None), ("a", 1.0, "0"),
     ("bb", 1.0, None), ("unknown", 1.0, "0"), ("[[", 1.0, "0")],
)  # fmt: skip
def test_choice_that_contradicts_the_logged_target_is_none(target, figure, expected):
    line = {"filtered_resps": loglikelihoods([-1.0, -4.0]), "arguments": arguments(["a", "bb"]), "target": target}
    assert chosen_answer(line, "acc", figure) == expected


def test_generated_text_is_the_answer_and_long_ones_are_shortened():
    assert chosen_answer({"filtered_resps": ["42"]}, "exact_match", 1.0) == "42"
    assert chosen_answer({"filtered_resps": [["42", "43"]]}, "exact_match", 1.0) == "['42', '43']"
    long, other = chosen_answer({"filtered_resps": ["x" * 999]}, "acc", 1.0), "x" * 998
    assert len(long or "") == 64
    assert long != chosen_answer({"filtered_resps": [other]}, "acc", 1.0)
    assert chosen_answer({"filtered_resps": [["-3.2", "True"]]}, "acc", 1.0) is None, "no choice among several"


@pytest.mark.slow
def test_choices_agree_with_the_accuracies_that_the_harness_computes(tmp_path):
    """Every question of a run with random log-likelihoods: right exactly where the choice is the right one."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    rng = np.random.default_rng(5)
    rows = [
        {"query": f"q{i}", "choices": rng.permutation(CHOICES).tolist(), "gold": int(rng.integers(4))}
        for i in range(80)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"metric": name} for name in ("acc", "acc_norm")]
    task = {
        "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "metric_list": metrics,
    }  # fmt: skip
    results = simple_evaluate(model="dummy", tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.model_name_sanitized = "dummy"
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples("toy", samples["toy"])
    (file,) = (tmp_path / "out").rglob("results_*.json")
    (record,) = read_file(file)
    chosen = {}
    for metric in ("acc", "acc_norm"):
        units = read_samples(record, f"{metric},none").units
        assert len(units) == 80
        for (_, index), unit in units.items():
            assert unit.answer is not None
            assert (int(unit.answer) == rows[index]["gold"]) == bool(unit.total)
        chosen[metric] = [unit.answer for unit in units.values()]
    assert chosen["acc"] != chosen["acc_norm"]
