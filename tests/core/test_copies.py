"""Functions that lmeval_ext and compare each have a copy of, because neither package imports the other, agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compare.errors
import lmeval_ext.errors
from compare.run.specs.paths import trained_context
from lmeval_ext.storage.checkpoint import read_config


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"max_position_embeddings": 77, "text_config": {"max_position_embeddings": 55}}, 55),
        ({"max_position_embeddings": 77, "text_config": {}}, None),
        ({"max_position_embeddings": 77, "text_config": None}, 77),
        ({"llm_config": {"max_position_embeddings": 55}, "vision_config": {"max_position_embeddings": 9}}, 55),
        ({"language_config": {"max_position_embeddings": 55}}, 55),
        ({"thinker_config": {"text_config": {"max_position_embeddings": 55}}}, 55),
        ({"thinker_config": {"audio_config": {"max_position_embeddings": 9}}}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "77"}, None),
        ({}, None),
    ],
)
def test_both_readers_of_the_context_length_agree(config: dict[str, Any], length: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).context_length == length
    assert trained_context(tmp_path) == length


@pytest.mark.parametrize("error", [ValueError("\n one\ntwo"), ConnectionError(), OSError(28, "No space left", "file")])
def test_both_first_lines_of_an_error_agree(error: Exception) -> None:
    assert compare.errors.first_line(error) == lmeval_ext.errors.first_line(error)
    assert "\n" not in compare.errors.first_line(error)
