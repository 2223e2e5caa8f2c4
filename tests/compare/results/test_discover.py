"""Result files are found under every name that the harness writes."""

from __future__ import annotations

import json

import pytest

from compare.results.discover import find_result_files
from tests.compare.conftest import result


@pytest.mark.parametrize(
    "name",
    [
        "results_2026-09-21T00-00-00.000001.json",
        "org__model/results_2026-09-21T00-00-00.json",
        "llama-bf16_2025-06-12T10-00-00.000001.json",
        "results.json",
        "llama-bf16.json",
        "llama-3.1-8b.JSON",
    ],
)
def test_each_name_of_the_harness_is_found(folder, compare, name):
    file = folder.write(result("m"), name)
    assert find_result_files([folder.path]) == ([file], [])
    assert [row["file"] for row in compare("table", folder.path, "--format", "json").json] == [str(file)]


def test_other_json_files_are_ignored_without_a_message(folder, compare):
    folder.write(result("m"))
    for name, content in {
        "config.json": {"model_type": "llama"},
        "compare_run.json": {"version": 1, "results": {}},
        "table.json": [{"label": "m"}],
    }.items():
        folder.raw(name, json.dumps(content).encode())
    out = compare("table", folder.path, "--format", "json")
    assert len(out.json) == 1
    assert out.err == ""


def test_damaged_result_of_any_name_is_reported(folder, compare):
    folder.write(result("m"))
    folder.raw("cut.json", json.dumps(result("n")).encode()[:-5])
    out = compare("table", folder.path, "--format", "json")
    assert [row["label"] for row in out.json] == ["m"]
    assert "cut.json: is not JSON, or is cut off" in out.err
