"""Data sets by name, rows, and chat templates, with the meaning that ExLlamaV3's compare_q gives them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.data_sets import DATA_SETS
from lmeval_ext.tasks.settings import TaskSettings
from tests.conftest import load_task

_TURN = "<s>{{ m.role }}: {{ m.content }}\n"
TEMPLATE = "{% for m in messages %}" + _TURN + "{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    folder.mkdir()
    for file in tiny_tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _ids(tokenizer: Path, eval_len: int, stride: int, max_rows: int, text: str) -> tuple[list[int], list[list[int]]]:
    """Return the template's ids and the windows after it, from compare_q's loop on plain lists."""
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(tokenizer)
    tokens = t(text)["input_ids"]
    windows = [tokens[a : a + eval_len] for a in range(0, len(tokens) - eval_len, stride)][:max_rows]
    prompt = "<s>system: \n<s>user: Say something.\n<s>a:"
    return t(prompt, add_special_tokens=False)["input_ids"], windows


def test_template_precedes_each_window_and_the_tail_is_scored(chat_tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("Snow fell on the harbour, and the boats lay still.\n" * 40)
    settings: dict[str, Any] = {"eval_len": 64, "stride": 48, "max_rows": 5, "warmup_tokens": 16}
    task = load_task("text_strided", text_path=str(text), tokenizer=str(chat_tokenizer), chat_template=True, **settings)
    task.build_all_requests()
    prefix, windows = _ids(chat_tokenizer, 64, 48, 5, "\n\n".join(text.read_text().splitlines(keepends=True)))
    assert [r.ids for r in task.instances] == [prefix + w for w in windows]
    # compare_q: logits[-(eval_len - warmup):][:-1] against input_ids[-(eval_len - warmup):][1:]
    assert [r.target_ids for r in task.instances] == [w[-48:][1:] for w in windows]
    record = task.dump_config()["metadata"]
    assert (record["chat_template"], record["prefix_tokens"]) == (True, len(prefix))
    assert record["scored_tokens"] == 5 * 47

    plain = load_task("text_strided", text_path=str(text), tokenizer=str(chat_tokenizer), **settings)
    plain.build_all_requests()
    assert plain.dump_config()["metadata"]["tokens_sha256"] != record["tokens_sha256"]


def test_template_counts_towards_the_context(chat_tokenizer: Path) -> None:
    with pytest.raises(
        UserError, match=r"eval_len=64 with the \d+ tokens of the chat template is beyond.*max_length=70"
    ):
        load_task(
            "sample_strided", tokenizer=str(chat_tokenizer), chat_template=True, eval_len=64, stride=64, max_length=70
        )


def test_tokenizer_without_a_template_raises_and_is_named(tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"chat_template=true: the tokenizer .* renders none"):
        load_task("sample_strided", tokenizer=str(tiny_tokenizer), chat_template=True, eval_len=64, stride=64)
    with pytest.raises(UserError, match="expected true or false"):
        load_task("sample_strided", tokenizer=str(tiny_tokenizer), chat_template="yes")


def test_max_text_rows_counts_blank_rows(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """compare_q takes the first rows, and then drops blank ones."""
    text = tmp_path / "t.txt"
    text.write_text("One line of some length about nothing.\n\nAnother line, of no more importance.\nA third one.\n")
    settings: dict[str, Any] = {"eval_len": 16, "stride": 8, "tokenizer": str(tiny_tokenizer), "text_path": str(text)}
    for rows, blank, expected in (
        (3, "drop", "One line of some length about nothing.\n\n\nAnother line, of no more importance.\n"),
        (3, "keep", "One line of some length about nothing.\n\n\n\n\nAnother line, of no more importance.\n"),
    ):
        task = load_task("text_strided", max_text_rows=rows, blank_rows=blank, **settings)
        from lmeval_ext.tasks.corpus import sha256

        assert task.dump_config()["metadata"]["text_sha256"] == sha256(expected)
    with pytest.raises(UserError, match="max_text_rows=-1"):
        load_task("text_strided", max_text_rows=-1, **settings)


@pytest.mark.parametrize(
    ("alias", "name", "split", "column"),
    [  # eval/compare_q.py, DATASET_ALIASES
        ("wiki2", "wikitext-2-raw-v1", "test", "text"),
        ("WikiText2", "wikitext-2-raw-v1", "test", "text"),
        ("wiki103", "wikitext-103-raw-v1", "test", "text"),
        ("tinystories", None, "validation", "text"),
        ("c4", "en", "validation", "text"),
        ("openwebtext", None, "train[:1000]", "text"),
        ("fineweb", "sample-10BT", "train[:1000]", "text"),
        ("ptb", None, "test", "sentence"),
    ],
)
def test_short_names_match_compare_q(alias: str, name: str | None, split: str, column: str) -> None:
    settings = TaskSettings.of({"dataset": alias})
    assert (settings.dataset_name, settings.dataset_split, settings.text_column) == (name, split, column)
    assert settings.bundled_text is None


def test_given_setting_wins_over_the_short_name() -> None:
    settings = TaskSettings.of({"dataset": "c4", "dataset_split": "train[:10]", "bundled_text": "sample.txt"})
    assert (settings.dataset_path, settings.dataset_split, settings.bundled_text) == ("allenai/c4", "train[:10]", None)
    assert TaskSettings.of({"dataset": "someone/texts"}).dataset_path == "someone/texts"
    assert TaskSettings.of({"dataset": "sample"}).bundled_text == "sample.txt"
    assert TaskSettings.of({}).dataset_path == "Salesforce/wikitext"


def test_misspelt_name_raises_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'tinystories'"):
        TaskSettings.of({"dataset": "tinystory"})


def test_every_row_names_a_source() -> None:
    assert all(row.path or row.bundled for row in DATA_SETS.values())
