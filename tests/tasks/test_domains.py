"""The domain texts: long enough for an error bar, not repetitive, and conversations by the tokenizer's own template."""

from __future__ import annotations

import json
import zlib

import pytest

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.bundled import DOMAINS, bundled_texts
from lmeval_ext.tasks.settings import TaskSettings
from lmeval_ext.tokens import HFTokenizer
from tests.conftest import TASKS, load_task

NAMES = ("prose", "german", "chinese", "japanese", "mathematics", "python", "c", "chat")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def text_of(name: str) -> str:
    path = DOMAINS / ("chat.jsonl" if name == "chat" else f"{name}.txt")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_original_matter_and_not_repetition(name):
    """English prose compresses to 0.4 of its bytes; lists and templates to 0.2 and less."""
    data = text_of(name).encode()
    assert len(data) > 25_000
    assert len(zlib.compress(data, 9)) / len(data) > (0.2 if name in ("python", "c") else 0.3)
    lines = [line for line in text_of(name).splitlines() if len(line) > 40]
    assert len(set(lines)) > (0.9 if name in ("python", "c") else 0.98) * len(lines)


def test_conversations_alternate_and_end_with_the_answer():
    conversations = [json.loads(line) for line in text_of("chat").splitlines()]
    assert len(conversations) >= 20
    for messages in conversations:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in messages)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "chat"])
def test_every_token_of_a_domain_is_in_one_window(name, tiny_tokenizer):
    task = load_task(f"domain_{name}", tokenizer=str(tiny_tokenizer), pretrained=str(tiny_tokenizer), eval_len=128)
    assert task.spec.block_windows == 1
    assert len(task.windows) >= 5
    assert [w.start for w in task.windows] == list(range(0, 128 * len(task.windows), 128))
    assert len(task.tokens.ids) - task.windows[-1].end <= 128


def test_conversations_are_rendered_by_the_tokenizers_own_template(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    with pytest.raises(UserError, match=r"conversations by a chat template: .* renders none") as error:
        load_task("domain_chat", tokenizer=str(tiny_tokenizer), pretrained=str(tiny_tokenizer), eval_len=128)
    assert "\n" not in str(error.value)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_tokenizer / "config.json").read_text())
    task = load_task("domain_chat", tokenizer=str(tmp_path), pretrained=str(tmp_path), eval_len=128)
    conversations = [json.loads(line) for line in text_of("chat").splitlines()]
    expected = "".join(f"<|{m['role']}|>{m['content']}</s>" for messages in conversations for m in messages)
    assert list(task.tokens.ids) == list(HFTokenizer(str(tmp_path)).encode(expected).ids)


def test_group_names_all_domains_and_the_tag_those_without_a_template():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert {f"domain_{name}" for name in NAMES} <= set(manager.all_subtasks)
    assert "domains" in manager.all_groups
    assert set(bundled_texts()) == {"sample.txt", *(f"domains/{n}.txt" for n in NAMES[:-1]), "domains/chat.jsonl"}


def test_unknown_bundled_text_lists_the_texts(tiny_tokenizer):
    assert TaskSettings.of({"bundled_text": "x"}).bundled_text == "x"
    with pytest.raises(UserError, match=r"bundled_text='x': expected one of sample.txt, domains/c.txt"):
        load_task(
            "domain_c", bundled_text="x", tokenizer=str(tiny_tokenizer), pretrained=str(tiny_tokenizer), eval_len=128
        )
