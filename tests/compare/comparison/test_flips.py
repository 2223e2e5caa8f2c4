"""Flips and equivalence in the tables: counts by hand, intervals by scipy, and what the samples do not show."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.flips import share
from compare.comparison.margins import Margin, check_used, margin_of, parse_margin
from compare.errors import CompareError
from compare.metrics import LossForm
from tests.compare.answer_files import TASK, answer_lines, fill, made_choices, write_answers
from tests.compare.comparison.test_pairs import add_task, documents
from tests.compare.conftest import Folder
from tests.compare.divergence_files import divergent, write, write_samples
from tests.compare.harness_files import suite

ACC = ("--metric", f"{TASK}/acc", "--versus", "base", "--format", "json")


def versus(compare, folder, *more, label="other"):
    out = compare("table", folder.path, *ACC, *more)
    assert out.code == 0, out.err
    return out.by_label()[label]


# ------------------------------------------------------------------ shares


def test_share_of_independent_questions_has_wilsons_interval():
    """By hand for 8 of 50: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    n, p, z = 50, 8 / 50, stats.norm.ppf(0.975)
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    own = share([True] * 8 + [False] * 42, [""] * 50)
    assert (own.count, own.value) == (8, 0.16)
    assert own.low == pytest.approx((p + z * z / 2 / n - half) / (1 + z * z / n))
    assert own.high == pytest.approx((p + z * z / 2 / n + half) / (1 + z * z / n))


def test_share_of_grouped_questions_has_the_interval_of_their_groups():
    """Equal groups of two: the t interval of the groups' own shares, by scipy; the same with each question twice."""
    marked = [True, True, False, False, False, True] * 5
    single = share(marked, [str(i) for i in range(30)])
    doubled = share([m for m in marked for _ in range(2)], [str(i) for i in range(30) for _ in range(2)])
    interval = stats.ttest_1samp(np.array(marked, float), 0).confidence_interval(0.95)
    assert (single.low, single.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (doubled.low, doubled.high) == (pytest.approx(single.low), pytest.approx(single.high))
    assert share([True, False] * 4, ["a", "b"] * 4).low is None, "two groups allow no interval"


# ------------------------------------------------------------------ the command


def test_flips_and_churn_worked_by_hand(folder, compare):
    """Ten questions, the right answer is 0: one lost, two gained, one from wrong to another wrong."""
    gold = np.zeros(10, int)
    base = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    other = np.array([0, 0, 0, 0, 2, 0, 0, 3, 1, 1])
    write_answers(folder, "base", base, gold)
    write_answers(folder, "other", other, gold)
    row = versus(compare, folder)
    counted = {
        name: row[name] for name in ("questions", "right_to_wrong", "wrong_to_right", "flips", "answers_changed")
    }
    assert counted == {
        "questions": 10, "right_to_wrong": 1, "wrong_to_right": 2, "flips": 3, "answers_changed": 4,
    }  # fmt: skip
    wilson = stats.binomtest(4, 10).proportion_ci(method="wilson")
    assert (row["answers_changed_share"], row["answers_changed_low"], row["answers_changed_high"]) == (
        0.4, pytest.approx(wilson.low), pytest.approx(wilson.high),
    )  # fmt: skip
    assert row["difference"] == pytest.approx(0.1)


def test_normalized_accuracy_has_its_own_answers(folder, compare):
    """The longest choice has the smallest log-likelihood; per character another one is chosen."""
    gold = np.random.default_rng(0).integers(0, 4, 60)
    base = made_choices(1, gold, 0.8)
    other = made_choices(2, gold, 0.3, base, 0.4)
    for label, chosen in (("base", base), ("other", other)):
        write_answers(folder, label, chosen, gold, metric="acc_norm")
    out = compare("table", folder.path, "--metric", f"{TASK}/acc_norm", "--versus", "base", "--format", "json")
    row = out.by_label()["other"]
    assert row["answers_changed"] == int((base != other).sum()) >= row["flips"] > 0


def test_other_answer_is_unknown_where_the_samples_do_not_show_it(folder, compare):
    for label, values in (("base", [1.0, 0.0] * 20), ("other", [1.0] * 40)):
        add_task(folder, label, TASK, "acc", values, float(np.mean(values)))
    row = versus(compare, folder)
    assert (row["wrong_to_right"], row["answers_changed"], row["answers_changed_low"]) == (20, None, None)
    assert "Other answer" not in compare("table", folder.path, *ACC[:4]).out


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.update(filtered_resps=line["filtered_resps"][::-1]),  # contradicts the logged target
        lambda line: line["filtered_resps"][0].__setitem__(0, "nan"),
        lambda line: line.update(filtered_resps=[]),
        lambda line: line.update(filtered_resps=[["-1.0", "False"]]),
        lambda line: line.update(filtered_resps="x"),
    ],
)
def test_choices_that_contradict_the_figure_are_not_counted(folder, compare, damage):
    gold = np.zeros(30, int)
    write_answers(folder, "base", gold, gold)
    file = write_answers(folder, "other", np.array([1] * 3 + [0] * 27), gold)
    lines = answer_lines(TASK, [1] * 3 + [0] * 27, gold.tolist())
    damage(lines[5])
    write_samples(file, lines, TASK)
    row = versus(compare, folder)
    assert (row["right_to_wrong"], row["answers_changed"]) == (3, None)


def test_generated_answers_are_compared_as_extracted(folder, compare):
    for label, texts in (("base", ["1", "2", "3", "4"] * 10), ("other", ["1", "2", "5", "6"] * 10)):
        content = suite(label, tasks=("gsm8k",), limit=40)
        right = [float(text in ("1", "5")) for text in texts]
        content["results"]["gsm8k"] = {"exact_match,strict-match": float(np.mean(right))}
        lines = [
            {**line, "filter": "strict-match", "filtered_resps": [text], "target": "1"}
            for line, text in zip(documents("gsm8k", right, "exact_match"), texts, strict=True)
        ]
        write(folder, content, lines, "gsm8k")
    out = compare("table", folder.path, "--metric", "gsm8k/exact_match", "--versus", "base", "--format", "json")
    row = out.by_label()["other"]
    assert (row["flips"], row["answers_changed"]) == (10, 20)


def test_subtasks_with_the_same_document_numbers_are_counted_each(folder, compare):
    """mmlu with nine subtasks, whose documents are all numbered from 0."""
    changed = 0
    for number, label in enumerate(("base", "other")):
        content, right = suite(label, tasks=("mmlu",)), []
        file = folder.write(content)
        for seed, task in enumerate(content["configs"]):
            gold = np.random.default_rng(seed).integers(0, 4, content["n-samples"][task]["effective"])
            base = made_choices(seed, gold, 0.6)
            chosen = made_choices(seed + 100, gold, 0.5, base, 0.2) if number else base
            changed += int((chosen != base).sum())
            write_samples(file, answer_lines(task, chosen.tolist(), gold.tolist()), task)
            content["results"][task]["acc,none"] = float((chosen == gold).mean())
            right += (chosen == gold).tolist()
        content["results"]["mmlu"]["acc,none"] = content["groups"]["mmlu"]["acc,none"] = float(np.mean(right))
        file.write_text(json.dumps(content))
    out = compare("table", folder.path, "--metric", "mmlu/acc", "--versus", "base", "--format", "json")
    row = out.by_label()["other"]
    assert (row["questions"], row["answers_changed"]) == (1450, changed)


def test_questions_on_one_text_are_no_independent_ones(folder, compare):
    """Every question four times: grouped, the interval and p are those of one each; taken apart, they are surer."""
    gold = np.zeros(40, int)
    base, other = np.array([0] * 30 + [1] * 10), np.array([0] * 22 + [2] * 8 + [0] * 2 + [1] * 8)
    groups = np.repeat(np.arange(40), 4)
    for label, chosen in (("base", base), ("other", other)):
        write_answers(folder, label, np.repeat(chosen, 4), np.repeat(gold, 4), groups=groups)
    row = versus(compare, folder, "--margin", "40")
    assert row["versus_method"] == "paired bootstrap over 40 groups of documents"
    differences = (other == 0).astype(float) - (base == 0)
    expected = stats.ttest_1samp(differences, 0)
    assert row["p"] == pytest.approx(expected.pvalue, rel=0.1)
    assert (row["questions"], row["units"]) == (160, 40)
    interval = stats.ttest_1samp((base != other).astype(float), 0).confidence_interval(0.95)
    assert row["answers_changed_low"] == pytest.approx(interval.low)
    assert row["equivalent"] is True


def test_a_task_names_the_field_that_groups_its_questions(folder, compare):
    for label, change in (("base", 0), ("other", 1)):
        content = suite(label, tasks=(TASK,), limit=40)
        lines = answer_lines(TASK, [0] * (40 - change) + [1] * change, [0] * 40)
        for i, line in enumerate(lines):
            line["doc"]["passage"] = i // 4
        content["results"][TASK]["acc,none"] = 1 - change / 40
        content["configs"][TASK]["metadata"]["group_by"] = "passage"
        write(folder, content, lines, TASK)
    assert versus(compare, folder)["versus_method"] == "paired bootstrap over 10 groups of documents"


def test_questions_that_only_one_model_answered_are_in_no_pair_and_said(folder, compare):
    gold = np.zeros(50, int)
    chosen = {"base": np.array([0] * 40 + [1] * 10), "other": np.array([0] * 35 + [1] * 15)}
    for label, first in (("base", 0), ("other", 5)):
        file = write_answers(folder, label, chosen[label][first : first + 45], gold[:45])
        lines = answer_lines(TASK, chosen[label].tolist(), gold.tolist())[first : first + 45]
        write_samples(file, lines, TASK)
    row = versus(compare, folder)
    assert (row["questions"], row["right_to_wrong"]) == (40, 5)
    assert row["versus_note"] == "over the 40 documents that both answered (5 only other, 5 only base)"
    assert "other: over the 40 documents that both answered" in compare("table", folder.path, *ACC[:4]).out


# ------------------------------------------------------------------ verdicts


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A baseline and five models that answered 3,000 questions: parsing them takes a second per command."""
    folder = Folder(tmp_path_factory.mktemp("answered"))
    fill(folder, 3000)
    return folder.path


MARGIN = ("--metric", f"{TASK}/acc", "--versus", "BF16", "--margin", "1")


@pytest.mark.slow
def test_verdicts_with_a_margin_and_how_many_questions_they_need(answered, compare):
    """The needed number is that of the power formula at the corrected level."""
    rows = compare("table", answered, *MARGIN, "--format", "json").by_label()
    verdicts = {label: row["verdict"] for label, row in rows.items()}
    assert verdicts["BF16"] == "baseline"
    assert verdicts["GGUF Q8_0"] == "equivalent within 1 point"
    assert verdicts["EXL3 3.0bpw"] == "worse"
    assert verdicts["NVFP4A16"].startswith("undecided: needs about ")
    assert {row["margin"] for row in rows.values()} == {0.01}
    assert rows["GGUF Q8_0"]["equivalence_p_holm"] >= rows["GGUF Q8_0"]["equivalence_p"]
    row = rows["NVFP4A16"]
    q, d = (row["flips"] + 2) / 3002, row["difference"]
    z = stats.norm.ppf
    equivalent = ((z(1 - 0.05 / 5) + z(0.9)) ** 2) * (q - d * d) / (0.01 - abs(d)) ** 2
    different = ((z(1 - 0.05 / 10) * math.sqrt(q) + z(0.8) * math.sqrt(q - d * d)) / d) ** 2
    assert row["units_needed"] == math.ceil(min(equivalent, different))


@pytest.mark.slow
def test_verdicts_with_a_wide_margin_and_without_one(answered, compare):
    wide = compare("table", answered, *MARGIN[:-1], "9", "--format", "json").by_label()
    assert wide["EXL3 3.0bpw"]["verdict"] == "worse, within 9 points"
    plain = compare("table", answered, *MARGIN[:-2], "--format", "json").by_label()
    assert plain["NVFP4A16"]["verdict"] == "not told apart"
    assert "margin" not in plain["NVFP4A16"]


@pytest.mark.slow
@pytest.mark.parametrize("table_format", ["terminal", "md", "csv"])
def test_every_format_has_the_verdicts(answered, compare, table_format):
    text = compare("table", answered, *MARGIN, "--format", table_format).out
    assert "equivalent within 1 point" in text
    if table_format != "csv":
        for heading in ("p (within 1 point)", "Flips", "Other answer", "Δ to BF16 (points)"):
            assert heading in text


def test_perplexities_are_compared_by_their_ratio(folder, compare):
    """Blocks of four windows: scipy's one-sided tests of the log ratios."""
    nll = {}
    for number, (label, size) in enumerate((("base", 0.0100), ("other", 0.0104))):
        content, lines = divergent(label, size=size, seed=number)
        nll[label] = np.array([line["token_perplexity"]["total"] for line in lines]).reshape(5, 4).sum(axis=1) / 1600
        write(folder, content, lines)
    logs = nll["other"] - nll["base"]
    chosen = ("--metric", "token_perplexity", "--versus", "base", "--margin", "perplexity=1%", "--format", "json")
    row = compare("table", folder.path, *chosen).by_label()["other"]
    assert row["ratio"] == pytest.approx(math.exp(logs.mean()), rel=1e-9)
    sides = [stats.ttest_1samp(logs, -math.log(1.01), alternative="greater").pvalue,
             stats.ttest_1samp(logs, math.log(1.01), alternative="less").pvalue]  # fmt: skip
    assert row["equivalence_p"] == pytest.approx(max(sides), rel=0.3, abs=1e-3)
    assert row["verdict"] == "equivalent within 1 %"
    narrow = compare("table", folder.path, *chosen[:5], "0.001%", "--format", "json").by_label()["other"]
    assert narrow["verdict"].startswith(("undecided: needs about", "worse", "better"))


def test_divergences_are_compared_in_nats(folder, compare):
    for number, (label, size) in enumerate((("base", 0.01), ("near", 0.0101), ("far", 0.08))):
        write(folder, *divergent(label, size=size, seed=number))
    chosen = ("--metric", "kld", "--versus", "base", "--format", "json")
    rows = compare("table", folder.path, *chosen, "--margin", "kld=0.03").by_label()
    assert rows["near"]["verdict"] == "equivalent within 0.03 nats"
    assert rows["far"]["verdict"] == "worse"
    assert rows["near"]["margin_form"] == "difference"


def test_too_few_windows_are_neither_equivalent_nor_undecided(folder, compare):
    for number, label in enumerate(("base", "other")):
        write(folder, *divergent(label, size=0.01, seed=number, windows=16))
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base", "--margin", "kld=1", "--format", "json")
    row = out.by_label()["other"]
    assert (row["verdict"], row["equivalent"], row["equivalence_p"]) == ("too few windows", None, None)


# ------------------------------------------------------------------ margins


def chosen_metric(key, task="mmlu"):
    return ChosenMetric(task, f"{key},none", True)


@pytest.mark.parametrize(
    ("key", "texts", "expected"),
    [
        ("acc", ["1"], Margin(0.01, LossForm.POINTS)),
        ("acc_norm", ["0.5", "2%"], Margin(0.005, LossForm.POINTS)),
        ("acc", ["1", "acc=2"], Margin(0.02, LossForm.POINTS)),
        ("acc", ["acc=2", "1"], Margin(0.02, LossForm.POINTS)),
        ("acc", ["mmlu/acc=3", "1"], Margin(0.03, LossForm.POINTS)),
        ("acc", ["arc/acc=3"], None),
        ("token_perplexity", ["1", "2%"], Margin(0.02, LossForm.RATIO)),
        ("word_perplexity", ["perplexity=0.5%"], Margin(0.005, LossForm.RATIO)),
        ("kld", ["1", "1%"], None),
        ("kld", ["kld=1e-3"], Margin(0.001, LossForm.DIFFERENCE, "nats")),
        ("em_of_another_task", ["1"], Margin(0.01, LossForm.POINTS)),
    ],
)
def test_margin_of_a_metric(key, texts, expected):
    assert margin_of(chosen_metric(key), [parse_margin(text) for text in texts], True) == expected


def test_margin_of_an_unknown_metric_that_is_no_share_is_in_its_own_unit():
    assert margin_of(chosen_metric("bleu"), [parse_margin("bleu=2")], False) == Margin(2.0, LossForm.DIFFERENCE)
    assert margin_of(chosen_metric("bleu"), [parse_margin("2")], False) is None


def test_margins_are_written_as_a_reader_reads_them():
    shown = [str(Margin(*each)) for each in (
        (0.01, LossForm.POINTS), (0.005, LossForm.POINTS), (0.01, LossForm.RATIO), (0.01, LossForm.DIFFERENCE, "nats"),
    )]  # fmt: skip
    assert shown == ["1 point", "0.5 points", "1 %", "0.01 nats"]
    assert Margin(0.01, LossForm.RATIO).bound == pytest.approx(math.log(1.01))


@pytest.mark.parametrize(("key", "text"), [("kld", "kld=1%"), ("token_perplexity", "perplexity=1"), ("acc", "acc=1%")])
def test_margins_in_another_unit_are_refused(key, text):
    with pytest.raises(CompareError, match=f"--margin {text}: the margin of {key} is in "):
        margin_of(chosen_metric(key), [parse_margin(text)], True)


@pytest.mark.parametrize("text", ["", "x", "=1", "-1", "0", "acc=", "1 point", "inf", "nan", "1%%", "1e999"])
def test_malformed_margins_are_refused(folder, compare, text):
    fill(folder, 50)
    out = compare("table", folder.path, "--metric", "acc", "--versus", "BF16", f"--margin={text}")
    assert out.code == 1
    assert "expected a number above 0" in out.err


def test_margins_that_fit_no_metric_are_refused(folder, compare):
    with pytest.raises(CompareError, match=r"--margin kld=1: it is for none of the metrics compared \(mmlu/acc\)"):
        check_used([parse_margin("kld=1")], [chosen_metric("acc")])
    fill(folder, 50)
    out = compare("table", folder.path, "--metric", "acc", "--versus", "BF16", "--margin", "1%")
    assert (out.code, out.out) == (1, "")
    assert "of acc it is in percentage points below 100: acc=1" in out.err
    alone = compare("table", folder.path, "--metric", "acc", "--margin", "1")
    assert "--margin 1 needs --versus LABEL" in alone.err
