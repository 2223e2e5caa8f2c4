"""Settings that decide a figure of a harness task: results that differ in one are kept apart."""

from __future__ import annotations

import copy

import pytest

from compare.results.reading import read_file
from compare.results.settings import model_arguments, read_settings
from tests.compare.conftest import Content


def today(model: str = "m", figure: float = 0.7, **changes: object) -> Content:
    """A file of one task, as lm-eval 0.4.13 writes it for a stock model."""
    content: Content = {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": figure, "acc_stderr,none": 0.01}},
        "group_subtasks": {"arc_easy": []},
        "configs": {"arc_easy": {"task": "arc_easy", "output_type": "multiple_choice", "num_fewshot": 5}},
        "versions": {"arc_easy": 1.0},
        "n-shot": {"arc_easy": 5},
        "higher_is_better": {"arc_easy": {"acc": True}},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 2376}},
        "config": {"model": "vllm", "model_args": f"pretrained=org/{model}", "limit": None, "fewshot_seed": 1234},
        "date": 1_750_000_000.0,
        "max_length": 4096,
        "task_hashes": {},
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
    }
    return content | changes


def old(model: str = "m", **config: object) -> Content:
    """A file of lm-eval 0.3."""
    stated = {
        "model": "hf-causal",
        "model_args": f"pretrained=org/{model}",
        "num_fewshot": 0,
        "batch_size": 2,
        "device": "cuda:0",
        "no_cache": True,
        "limit": None,
        "bootstrap_iters": 100_000,
        "description_dict": {},
    }
    return {
        "results": {"arc_easy": {"acc": 0.2, "acc_stderr": 0.01}},
        "versions": {"arc_easy": 0},
        "config": stated | config,
    }  # fmt: skip


def changed(content: Content, path: str, value: object) -> Content:
    """A copy with the value under a dotted path replaced, or added; None removes the key."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    at = content
    for parent in parents:
        at = at.setdefault(parent, {})
    if value is None:
        at.pop(last, None)
    else:
        at[last] = value
    return content


def groups(folder, compare, *contents: Content) -> list[int]:
    """The group of each content's model: 0 is compared, the others are kept apart."""
    for number, content in enumerate(contents):
        arguments = content["config"]["model_args"]
        content = changed(content, "config.model_args", f"{arguments},revision=r{number}")
        content["date"] = 1_750_000_000.0 + number
        folder.write(content, f"{number}/results_2026-01-01T00-00-00.{number}.json")
    metric = "arc_easy/word_perplexity" if "word_perplexity,none" in content["results"]["arc_easy"] else "arc_easy/acc"
    out = compare("table", folder.path, "--metric", metric, "--format", "json")
    assert out.code == 0, out.err
    by_file = {row["file"]: row["group"] for row in out.json}
    assert len(by_file) == len(contents)
    if len(set(by_file.values())) > 1:
        assert "kept apart" in out.err
    return [by_file[file] for file in sorted(by_file)]


TEMPLATE = {"chat_template": "template a", "chat_template_sha": "aaaaaaaaaa", "fewshot_as_multiturn": False}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("versions.arc_easy", 2.0),
        ("n-shot.arc_easy", 25),
        ("n-samples.arc_easy.effective", 100),
        ("config.fewshot_seed", 7),
        ("config.model_args", "pretrained=org/m,add_bos_token=True"),
        ("config.model_args", "pretrained=org/m,enable_thinking=True"),
        ("chat_template_sha", "bbbbbbbbbb"),
        ("fewshot_as_multiturn", True),
        ("system_instruction", "Answer briefly."),
        ("configs.arc_easy.description", "Answer the question."),
        ("configs.arc_easy.doc_to_text", "{{question}}"),
        ("configs.arc_easy.fewshot_config", {"sampler": "first_n"}),
    ],
)
def test_one_setting_that_differs_is_kept_apart(folder, compare, path, value):
    content = today() | TEMPLATE
    assert groups(folder, compare, content, content, changed(content, path, value)) == [0, 0, 1]


def test_template_text_counts_where_its_checksum_is_missing(folder, compare):
    first, second = (today(chat_template=f"template {name}", fewshot_as_multiturn=False) for name in "ab")
    assert groups(folder, compare, first, first, second) == [0, 0, 1]


def test_generation_arguments_of_run_and_task_are_compared(folder, compare):
    content = changed(today(), "configs.arc_easy.output_type", "generate_until")
    content = changed(content, "configs.arc_easy.generation_kwargs", {"until": ["\n"], "temperature": 0.0})
    other = changed(content, "configs.arc_easy.generation_kwargs", {"until": ["\n"], "temperature": 0.6})
    given = changed(content, "config.gen_kwargs", "temperature=0.6")
    assert sorted(groups(folder, compare, content, content, other, given)) == [0, 0, 1, 2]


def test_max_length_decides_rolling_tasks_only(folder, compare):
    content = changed(today(), "configs.arc_easy.output_type", "loglikelihood_rolling")
    content["results"]["arc_easy"] = {"word_perplexity,none": 12.0}
    assert groups(folder, compare, content, content, content | {"max_length": 2048}) == [0, 0, 1]


def test_max_length_of_multiple_choice_is_not_compared(folder, compare):
    assert groups(folder, compare, today(), today(max_length=2048)) == [0, 0]


@pytest.mark.parametrize(
    ("content", "path", "missing"),
    [
        (today(), "n-samples", None),
        (today(), "n-shot", "few-shot count"),
        (today(), "versions", "task version"),
        (old(), "config.num_fewshot", "few-shot count"),
        (old(), "config.limit", "number of samples"),
        (today() | TEMPLATE, "fewshot_as_multiturn", "few-shot form"),
    ],
)
def test_unknown_setting_equals_no_other(folder, compare, content, path, missing):
    if path == "n-shot":
        content = changed(content, "configs.arc_easy.num_fewshot", None)
    content = changed(content, path, None)
    expected = [0, 0] if missing is None else [0, 1]
    assert groups(folder, compare, content, content) == expected
    out = compare("table", folder.path, "--metric", "arc_easy/acc")
    assert (f"its file does not say: {missing}" in out.err) == (missing is not None)


def test_rolling_task_of_version_0_3_without_max_length_is_unknown(folder):
    content = old()
    content["results"]["arc_easy"] = {"word_perplexity": 12.0, "byte_perplexity": 1.5, "bits_per_byte": 0.6}
    (record,) = read_file(folder.write(content))
    assert record.protocol.missing == ("max_length",)
    named = changed(content, "config.model_args", "pretrained=org/m,max_length=2048")
    (record,) = read_file(folder.write(named))
    assert (record.protocol.missing, record.protocol.harness[-1]) == ((), "max_length 2048")


def test_shots_and_limit_of_version_0_3_are_read_from_its_config(folder, compare):
    contents = (old(), old(), old(num_fewshot=25), old(limit=10), old(description_dict={"arc_easy": "Answer."}))
    found = groups(folder, compare, *contents)
    assert found[:2] == [0, 0]
    assert sorted(found[2:]) == [1, 2, 3]


def test_limit_counts_where_samples_are_not_counted(folder, compare):
    uncounted = changed(today(), "n-samples", None)
    limited = changed(uncounted, "config.limit", 20.0)
    share = changed(uncounted, "config.limit", 0.1)
    found = groups(folder, compare, uncounted, uncounted, limited, share)
    assert found[:2] == [0, 0]
    assert sorted(found[2:]) == [1, 2]


def test_metadata_of_version_0_4_0_has_the_task_version():
    content = changed(today(), "versions", None)
    content["configs"]["arc_easy"]["metadata"] = [{"version": 1.0}]
    assert read_settings(content, {}, "arc_easy").stated[0] == "version 1.0"


def test_different_task_hashes_are_kept_apart_and_a_missing_one_is_unknown(folder, compare):
    logged = [changed(today(), "task_hashes.arc_easy", sha) for sha in ("a", "a", "b")]
    assert groups(folder, compare, *logged) == [0, 0, 1]
    assert sorted(groups(folder, compare, *logged, today())) == [0, 0, 1, 2]


def test_results_with_and_without_samples_are_compared(folder, compare):
    assert groups(folder, compare, changed(today(), "task_hashes.arc_easy", "a"), today()) == [0, 0]


def test_subtasks_with_different_shots_are_known(folder):
    content = today()
    content["group_subtasks"] = {"suite": ["arc_easy", "other"]}
    for name in ("results", "configs", "versions", "n-samples"):
        content[name]["other"] = content[name]["arc_easy"]
    content["n-shot"]["other"] = 0
    content["results"]["suite"] = {"acc,none": 0.5}
    record = next(r for r in read_file(folder.write(content)) if r.task == "suite")
    assert record.protocol.missing == ()
    assert any(setting.startswith("mixed (") and setting.endswith("-shot") for setting in record.protocol.harness)


def test_address_of_a_function_in_a_configuration_does_not_count():
    first, second = (
        changed(today(), "configs.arc_easy.doc_to_text", f"<function f at 0x7f{n}>") for n in ("00aa", "11bb")
    )
    assert read_settings(first, {}, "arc_easy") == read_settings(second, {}, "arc_easy")


def test_nested_model_arguments_are_kept_as_text():
    assert model_arguments({"chat_template_args": {"b": 1, "a": None}}) == {"chat_template_args": '{"a": null, "b": 1}'}


def test_version_of_a_subtask_is_part_of_its_groups_settings(folder):
    def group_of(version: float | None) -> tuple[str, tuple[str, ...]]:
        content = changed(today(), "versions.arc_easy", version)
        content["group_subtasks"] = {"suite": ["arc_easy"]}
        content["versions"]["suite"] = 2
        settings = read_settings(content, {"suite": ("arc_easy",)}, "suite")
        return settings.configuration, settings.unknown

    assert group_of(1.0) == group_of(1.0)
    assert group_of(1.0) != group_of(2.0)
    assert group_of(None)[1] == ("versions of the subtasks",)
