"""Which results are comparable, and on which metric."""

from __future__ import annotations

import pytest

from compare.results.arithmetic import ACTIVATIONS, WEIGHT_ONLY, arithmetic_run
from tests.compare.conftest import result


def test_results_over_other_tokens_are_kept_apart_and_named(folder, compare):
    for number in range(3):
        folder.add(f"main {number}", "GGUF", f"s{number}", 3.0 + number, 9.0 - number)
    folder.add("stranger", "GGUF", "s9", 4.5, 5.0, tokens="other", windows=2)
    out = compare("table", folder.path, "--format", "json", "--sort", "metric")
    assert [(r["label"], r["comparable"]) for r in out.json][-1] == ("stranger", False), "never ranked with the rest"
    warning = next(line for line in out.err.splitlines() if "kept apart" in line)
    assert "stranger" in warning
    assert "main" not in warning
    assert "main 0, main 1, main 2" in out.err
    mixed = compare("table", folder.path, "--format", "json", "--sort", "metric", "--allow-mixed")
    assert mixed.json[0]["label"] == "stranger"
    assert "mixed as asked" in mixed.err


def test_another_protocol_is_kept_apart_even_with_equal_tokens(folder, compare):
    folder.add("a", "GGUF", "a", 3.0, 9.0)
    folder.add("b", "GGUF", "b", 4.0, 8.0)
    folder.add("c", "GGUF", "c", 5.0, 7.0, protocol="sliding")
    assert not compare("table", folder.path, "--format", "json").by_label()["c"]["comparable"]


def test_of_equally_large_groups_the_one_with_the_baseline_is_compared(folder, compare):
    folder.add("a", "GGUF", "a", 3.0, 9.0, tokens="0")
    folder.add("b", "GGUF", "b", 4.0, 8.0, tokens="0")
    folder.add("c", "GGUF", "c", 3.0, 9.0, tokens="1")
    folder.add("bf", "full precision", "bfloat16", 16.0, 7.0, tokens="1")
    records = compare("table", folder.path, "--format", "json").by_label()
    assert {label: r["comparable"] for label, r in records.items()} == {"a": False, "b": False, "c": True, "bf": True}


def test_metric_defaults_to_perplexity_and_unknown_ones_are_refused(folder, compare):
    folder.add("a")
    assert compare("table", folder.path, "--format", "json").json[0]["metric"] == "token_perplexity,none"
    typo = compare("table", folder.path, "--metric", "top1_acuracy")
    assert typo.code == 1
    assert "did you mean" in typo.err
    assert "top1_accuracy" in typo.err
    folder.add("a", task="wiki2_gptq")
    several = compare("table", folder.path)
    assert several.code == 1
    assert "wiki2_strided/token_perplexity" in several.err
    assert "wiki2_gptq/token_perplexity" in several.err
    chosen = compare("table", folder.path, "--format", "json", "--metric", "wiki2_gptq/token_perplexity")
    assert [r["task"] for r in chosen.json] == ["wiki2_gptq"]


def test_metric_without_filter_takes_the_first_filter_and_reports_it(folder, compare):
    content = result("m", task="gsm8k")
    content["results"]["gsm8k"] = {"exact_match,strict-match": 0.4, "exact_match,flexible-extract": 0.5}
    folder.write(content)
    assert compare("table", folder.path).code == 2, "no perplexity anywhere"
    first = compare("table", folder.path, "--format", "json", "--metric", "gsm8k/exact_match")
    assert (first.json[0]["value"], first.json[0]["metric"]) == (0.4, "exact_match,strict-match"), "the task's first"
    assert "exact_match has 2 filters; shown: gsm8k/exact_match,strict-match" in first.err
    assert "gsm8k/exact_match,flexible-extract" in first.err
    out = compare("table", folder.path, "--format", "json", "--metric", "gsm8k/exact_match,strict-match")
    assert (out.json[0]["value"], out.json[0]["ppl"]) == (0.4, None)


def test_harness_tasks_with_another_limit_are_kept_apart(folder, compare):
    for label, samples in (("a", 1319), ("b", 1319), ("c", 100)):
        content = result(label, "GGUF", label, 4.0, task="gsm8k")
        content["configs"]["gsm8k"]["metadata"] = {"version": 3.0}
        content["results"]["gsm8k"] = {"acc,none": 0.5}
        content["n-samples"]["gsm8k"]["effective"] = samples
        folder.write(content)
    out = compare("table", folder.path, "--format", "json", "--metric", "acc")
    assert {r["label"]: r["comparable"] for r in out.json} == {"a": True, "b": True, "c": False}


@pytest.mark.parametrize(
    ("scheme", "kernel", "notes", "expected"),
    [
        ("nvfp4", "EmulationNvFp4LinearKernel", (), ACTIVATIONS),
        ("nvfp4", "MarlinNvFp4LinearKernel", (), WEIGHT_ONLY),
        ("nvfp4", None, ("weight-only: activations stay in 16 bit",), WEIGHT_ONLY),
        ("nvfp4a16", None, (), WEIGHT_ONLY),
        ("w4a16-g64", None, (), WEIGHT_ONLY),
        ("w8a8", None, (), ACTIVATIONS),
        ("fp8-dynamic", None, (), ACTIVATIONS),
        ("bitnet-b1.58", "bitnet", (), ACTIVATIONS),
        ("torchao-Int8DynamicActivationInt8Weight", "torchao", (), ACTIVATIONS),
        ("torchao-Int8WeightOnly", "torchao", (), WEIGHT_ONLY),
        ("quanto-int8-int8", "quanto", (), ACTIVATIONS),
        ("quanto-int4", "quanto", (), WEIGHT_ONLY),
        ("Q4_K_M", None, (), WEIGHT_ONLY),
        ("exl3", None, (), WEIGHT_ONLY),
    ],
)
def test_arithmetic_follows_from_scheme_kernel_and_notes(scheme, kernel, notes, expected):
    assert arithmetic_run(scheme, kernel, notes) == expected


@pytest.mark.parametrize(
    "arguments", [[], ["table"], ["nonsense"], ["table", "x", "--x", "weight"], ["plot", "x", "--max-x", "a"]]
)
def test_wrong_usage_is_exit_code_1_with_one_line(compare, arguments):
    out = compare(*arguments)
    assert out.code == 1
    assert len(out.err.splitlines()) == 1
