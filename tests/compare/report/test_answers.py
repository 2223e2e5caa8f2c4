"""The report's section on answers that changed, and its tables with --versus and --margin."""

from __future__ import annotations

from html import unescape

import numpy as np
import pytest

from tests.compare.answer_files import fill, made_choices, write_answers
from tests.compare.conftest import fill_with_ladders
from tests.compare.divergence_files import divergent, write

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def page(folder, compare, tmp_path):
    """Returns a function that writes a report on `folder` and returns its text and the messages."""

    def make(*flags: object) -> tuple[str, str]:
        out = compare("report", folder.path, "-o", tmp_path / "page.html", *flags)
        assert out.code == 0, out.err
        return unescape((tmp_path / "page.html").read_text()), out.err

    return make


def answers(text: str) -> str:
    return text[text.index('<section id="answers">') : text.index('<section id="settings">')]


def test_answers_are_compared_with_full_precision_whatever_metric_is_shown(folder, page):
    fill(folder, 400)
    for number, label in enumerate(("a", "b")):
        write(folder, *divergent(label, size=0.01 * (number + 1), seed=number))
    text, _ = page("--metric", "token_perplexity")
    section = answers(text)
    for words in ("Flips", "Other answer", "Δ to BF16 (points)", "GGUF Q4_K_M", "Answers that turned, against BF16"):
        assert words in section
    assert "Verdict" not in text[: text.index('<section id="answers">')], "the main table has no pairs"


@pytest.mark.slow
def test_margin_puts_equivalence_into_the_main_table_and_the_section(folder, page):
    fill(folder, 3000)
    text, _ = page("--metric", "hellaswag/acc", "--versus", "BF16", "--margin", "1")
    assert text.count("equivalent within 1 point") >= 3
    assert "<table" not in answers(text), "shown once, in the main table"
    assert '<p class="note">Equivalent: two one-sided tests show a difference of less than 1 point' in text


def test_versus_names_another_model(folder, page):
    fill(folder, 200)
    text, _ = page("--metric", "hellaswag/acc_norm", "--metric", "hellaswag/acc", "--versus", "Q8_0")
    assert "Answers that turned, against GGUF Q8_0" in text


def test_no_section_without_samples_and_no_word_about_it(folder, page):
    fill_with_ladders(folder, per_family=1)
    text, messages = page()
    assert 'id="answers"' not in text
    assert "answers" not in messages


def test_answers_without_a_baseline_are_said_not_to_be_compared(folder, page):
    gold = np.random.default_rng(0).integers(0, 4, 50)
    for number, label in enumerate(("Q4", "Q8")):
        write_answers(folder, label, made_choices(number, gold, 0.6), gold)
    text, messages = page("--metric", "hellaswag/acc")
    assert 'id="answers"' not in text
    assert "no result says that it is in full precision; name the model to compare with: --versus LABEL" in messages


def test_unknown_label_and_margin_without_versus_are_errors(folder, compare, tmp_path):
    fill(folder, 60)
    target = tmp_path / "page.html"
    for flags, words in ((("--versus", "nobody"), "no model of hellaswag/acc has such a label"),
                         (("--margin", "1"), "--margin 1 needs --versus LABEL")):  # fmt: skip
        out = compare("report", folder.path, "--metric", "acc", "-o", target, *flags)
        assert out.code == 1
        assert words in out.err
        assert not target.exists()
