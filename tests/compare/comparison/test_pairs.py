"""`compare table --versus`: paired differences, checked against scipy's tests and tables worked by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from scipy import stats

from compare.comparison.significance import blocks_of, bootstrap, holm, mcnemar
from compare.metrics import mean
from tests.compare.conftest import sha
from tests.compare.divergence_files import TASK, divergent, fill, write, write_samples
from tests.compare.harness_files import suite

# ------------------------------------------------------------------ the statistics


def rows(values, counts=None):
    return np.stack([values, np.ones(len(values)) if counts is None else counts], axis=1)


@pytest.mark.parametrize("blocks", [5, 8, 60, 3000])
def test_interval_of_a_mean_equals_scipys_paired_t_interval(blocks):
    """For equal counts the bootstrap error of a mean has a closed form, the standard error that scipy uses."""
    rng = np.random.default_rng(blocks)
    shared = rng.normal(0, 5, blocks)
    a, b = shared + rng.normal(0.3, 1, blocks), shared + rng.normal(0, 1, blocks)
    paired, expected = bootstrap(rows(a), rows(b), mean), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert paired.value == pytest.approx((a - b).mean(), rel=1e-12)
    assert (paired.low, paired.high) == (pytest.approx(interval.low, abs=0.06), pytest.approx(interval.high, abs=0.06))
    assert paired.p == pytest.approx(expected.pvalue, abs=0.03)
    assert paired.high - paired.low == pytest.approx(interval.high - interval.low, rel=0.05)
    apart = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert paired.high - paired.low < 0.6 * (apart.high - apart.low), "the common part cancels"


def test_difference_of_two_perplexities_agrees_with_the_delta_method():
    """Var(exp x̄ − exp ȳ) ≈ Var of the mean of e^x̄ x − e^ȳ y, blocks weighing by their tokens."""
    rng = np.random.default_rng(4)
    counts = rng.integers(900, 1100, 40).astype(float)
    base = rng.normal(2.2, 0.2, 40)
    a, b = base + rng.normal(0.05, 0.02, 40), base + rng.normal(0, 0.02, 40)
    paired = bootstrap(rows(a * counts, counts), rows(b * counts, counts), lambda t, c: np.exp(t / c))
    weights = counts / counts.sum()
    x, y = (a * weights).sum(), (b * weights).sum()
    assert paired.value == pytest.approx(math.exp(x) - math.exp(y), rel=1e-12)
    influence = weights * (math.exp(x) * (a - x) - math.exp(y) * (b - y))
    error = math.sqrt((influence**2).sum() * 40 / 39)
    half = stats.t.ppf(0.975, 39) * error
    assert paired.high - paired.value == pytest.approx(half, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [5, 6, 10])
def test_interval_from_few_blocks_has_its_nominal_coverage(blocks):
    """1,500 samples of a true difference of 0.2: 95 % of the intervals contain it, unlike percentile intervals."""
    rng = np.random.default_rng(blocks)
    covered = percentile = 0
    for _ in range(1500):
        a, b = rng.normal(0.2, 1, blocks), rng.normal(0, 0.3, blocks)
        paired = bootstrap(rows(a), rows(b), mean)
        covered += paired.low <= 0.2 <= paired.high
        means = (a - b)[rng.integers(blocks, size=(400, blocks))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        percentile += low <= 0.2 <= high
    assert 0.93 < covered / 1500 < 0.97
    assert percentile / 1500 < 0.91


def test_equal_models_are_not_told_apart():
    values = np.arange(6.0)
    paired = bootstrap(rows(values), rows(values), mean)
    assert (paired.value, paired.low, paired.high, paired.p) == (0, 0, 0, 1)
    shifted = bootstrap(rows(values + 1), rows(values), mean)
    assert shifted.value == 1
    assert shifted.p < 1e-9


def test_fewer_than_five_blocks_give_no_interval():
    paired = bootstrap(rows(np.arange(4.0)), rows(np.arange(4.0) + 1), mean)
    assert (paired.value, paired.low, paired.high, paired.p) == (-1, None, None, None)


def test_leftover_windows_join_the_last_block():
    table = blocks_of([(float(i), 1.0) for i in range(11)], 4)
    assert table.tolist() == [[0 + 1 + 2 + 3, 4], [4 + 5 + 6 + 7 + 8 + 9 + 10, 7]]
    assert blocks_of([(1.0, 2.0)] * 3, 4).tolist() == [[3, 6]]


def test_mcnemar_worked_by_hand():
    """10 documents that only the first has right, 2 that only the second has, of 100: p = 2 · Σ C(12, 0…2) / 2¹²."""
    a = [1.0] * 60 + [1.0] * 10 + [0.0] * 2 + [0.0] * 28
    b = [1.0] * 60 + [0.0] * 10 + [1.0] * 2 + [0.0] * 28
    paired = mcnemar(a, b)
    assert paired.value == pytest.approx(0.08)
    assert paired.p == pytest.approx(2 * (1 + 12 + 66) / 2**12, rel=1e-12)
    # Bonett and Price: 11 and 3 of 102
    p12, p21 = 11 / 102, 3 / 102
    half = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert (paired.low, paired.high) == (
        pytest.approx(8 / 102 - half, rel=1e-5),
        pytest.approx(8 / 102 + half, rel=1e-5),
    )
    other = mcnemar(b, a)
    assert (other.value, other.p) == (-paired.value, paired.p)


def test_mcnemar_without_a_discordant_pair():
    paired = mcnemar([1.0, 0.0] * 50, [1.0, 0.0] * 50)
    assert (paired.value, paired.p) == (0, 1)
    assert paired.low < 0 < paired.high


@pytest.mark.slow
def test_interval_of_a_share_has_its_nominal_coverage():
    """True difference 0.03 over 200 documents, with correlated models."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        kind = rng.choice(4, size=200, p=[0.5, 0.08, 0.05, 0.37])  # both, only first, only second, neither
        paired = mcnemar((kind <= 1).astype(float).tolist(), ((kind == 0) | (kind == 2)).astype(float).tolist())
        covered += paired.low <= 0.03 <= paired.high
    assert 0.94 < covered / 2000 < 0.98


def test_holm_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# ------------------------------------------------------------------ the command, on windows


def json_of(out):
    assert out.code == 0, out.err
    return out.by_label()


def test_paired_differences_over_windows(folder, compare):
    """By hand: 20 windows in five blocks of four, summed; then scipy's paired test of their means."""
    contents = {}
    for number, (label, size) in enumerate((("base", 0.01), ("near", 0.0101), ("far", 0.08))):
        contents[label] = divergent(label, size=size, seed=number)
        write(folder, *contents[label])
    records = json_of(compare("table", folder.path, "--metric", "kld", "--versus", "base", "--format", "json"))
    means = {
        label: np.array([line["kld"]["total"] for line in lines]).reshape(5, 4).sum(axis=1) / 1600
        for label, (_, lines) in contents.items()
    }
    for label in ("near", "far"):
        expected = stats.ttest_rel(means[label], means["base"])
        interval, record = expected.confidence_interval(0.95), records[label]
        assert record["difference"] == pytest.approx(expected.statistic * expected._standard_error, rel=1e-9)
        assert record["difference_high"] - record["difference_low"] == pytest.approx(
            interval.high - interval.low, rel=0.03
        )
        assert record["p"] == pytest.approx(expected.pvalue, rel=0.15)
        assert "5 blocks of 4 windows" in record["versus_method"]
    assert (records["far"]["verdict"], records["far"]["separated"]) == ("worse", True)
    assert (records["near"]["verdict"], records["near"]["separated"]) == ("not told apart", False)
    assert records["far"]["p_holm"] == pytest.approx(2 * records["far"]["p"])
    assert records["base"]["difference"] is None
    assert records["base"]["verdict"] == "baseline"


def test_direction_of_the_metric_decides_better_or_worse(folder, compare):
    for number, (label, size) in enumerate((("base", 0.002), ("far", 0.08))):
        write(folder, *divergent(label, size=size, seed=number))
    for metric in ("top1_agreement", "token_perplexity", "kld"):
        records = json_of(compare("table", folder.path, "--metric", metric, "--versus", "base", "--format", "json"))
        assert records["far"]["verdict"] == "worse", metric
        records = json_of(compare("table", folder.path, "--metric", metric, "--versus", "far", "--format", "json"))
        assert records["base"]["verdict"] == "better", metric


def test_every_format_has_the_pairs(folder, compare, tmp_path):
    fill(folder)
    chosen = ("--metric", "kld", "--metric", "top1_agreement", "--versus", "q4_k_m")
    terminal = compare("table", folder.path, *chosen).out
    for words in ("Δ to GGUF Q4_K_M", "95 % interval", "p (Holm)", "Verdict", "corrected for the 12 pairs"):
        assert words in terminal
    markdown = compare("table", folder.path, *chosen, "--format", "md").out
    assert markdown.count("| Verdict |") == 2
    assert "in pairs (paired bootstrap over 5 blocks of 4 windows, t at 4 degrees of freedom)" in markdown
    rows = list(csv.DictReader(io.StringIO(compare("table", folder.path, *chosen, "--format", "csv").out)))
    records = compare("table", folder.path, *chosen, "--format", "json").json
    assert len(rows) == len(records) == 26
    assert [row["verdict"] for row in rows] == [record["verdict"] for record in records]
    assert rows[2]["difference"] == str(records[2]["difference"])


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_shows_every_verdict(folder, compare, monkeypatch, width):
    fill(folder)
    monkeypatch.setenv("COLUMNS", str(width))
    for versus in ([], ["--versus", "q4_k_m"]):
        out = compare("table", folder.path, "--metric", "kld", *versus).out
        (headings,) = [line for line in out.splitlines() if line.startswith("Model ")]
        assert "KL divergence (nats)" in headings
        assert ("Verdict" in headings) == bool(versus)
        records = compare("table", folder.path, "--metric", "kld", *versus, "--format", "json").json
        figures = [f"{record['value']:.4g}" for record in records if record["value"] < 0.1]
        assert all(figure in out for figure in figures)
        assert "within" in out
        if versus:
            assert out.count(" worse") == sum(record["verdict"] == "worse" for record in records)


def test_too_few_windows_give_no_verdict(folder, compare):
    for number, (label, size) in enumerate((("base", 0.01), ("far", 0.08))):
        write(folder, *divergent(label, size=size, seed=number, windows=16))
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base", "--format", "json")
    record = json_of(out)["far"]
    assert record["difference"] > 0
    assert (record["difference_low"], record["p_holm"], record["separated"]) == (None, None, None)
    assert record["verdict"] == "too few windows"
    assert "allow no verdict" in compare("table", folder.path, "--metric", "kld", "--versus", "base").out


def test_missing_samples_are_named(folder, compare):
    write(folder, *divergent("base", seed=1))
    write(folder, *divergent("b", size=0.05, seed=2))
    bare = write(folder, divergent("c", size=0.05, seed=3)[0])
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base", "--format", "json")
    assert json_of(out)["b"]["verdict"] == "worse"
    assert json_of(out)["c"]["difference"] is None
    (line,) = [line for line in out.err.splitlines() if "no pair: c" in line]
    assert f"{bare.parent}/samples_{TASK}_{bare.stem.removeprefix('results_')}.jsonl does not exist" in line
    assert "--log_samples" in line
    nothing = compare("table", folder.path, "--metric", "kld", "--versus", "c")
    assert nothing.code == 2
    assert nothing.out == ""
    assert nothing.err.splitlines()[-1].startswith("compare: --versus c: no pair can be formed: ")
    assert "--log_samples" in nothing.err


def test_samples_beside_a_file_with_its_own_name(folder, compare):
    """The harness appends the date to the name of an output path that ends in .json."""
    for number, label in enumerate(("base", "b")):
        content, lines = divergent(label, size=0.01 * (number + 1), seed=number)
        date = f"2026-11-24T10-00-0{number}.123456"
        file = folder.write(content, f"own_{date}.json")
        write_samples(file.with_name(f"results_{date}.json"), lines)
    files = sorted(folder.path.glob("own_*.json"))
    out = compare("table", *files, "--metric", "kld", "--versus", "base", "--format", "json")
    assert json_of(out)["b"]["difference"] is not None


@pytest.mark.parametrize("path", ["out", "out/own.json"])
def test_samples_written_by_the_harness_are_located(tmp_path, compare, path):
    """Its own tracker writes results and samples, into a folder or beside a named file."""
    from lm_eval.loggers import EvaluationTracker

    for number, label in enumerate(("base", "b")):
        content, lines = divergent(label, size=0.01 * (number + 1), seed=number)
        tracker = EvaluationTracker(output_path=str(tmp_path / str(number) / path))
        tracker.general_config_tracker.model_name_sanitized = label
        tracker.save_results_aggregated(results=content, samples={TASK: lines})
        tracker.save_results_samples(TASK, [{**line, "arguments": [("x",)], "resps": [["y"]]} for line in lines])
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2
    out = compare("table", *files, "--metric", "kld", "--versus", "base", "--format", "json")
    assert json_of(out)["b"]["difference"] is not None, out.err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda lines: lines.pop(), "other windows: 19 against 20; window 19 of wiki2_strided is only in one"),
        (lambda lines: lines[3]["doc"].update(start=7), "window 3 of wiki2_strided the first (its place)"),
        (lambda lines: lines[3]["kld"].update(nonfinite=2), "window 3: 2 log-probabilities are not finite"),
        (lambda lines: lines[3]["kld"].update(total=None), "window 3: some log-probabilities are not finite"),
        (lambda lines: lines[3]["kld"].update(window="x"), "has no window"),
        (lambda lines: lines[3].update(doc=7), "window 3 lacks start, end or first_target"),
        (lambda lines: lines.append(lines[3]), "line 21: document 3 appears twice"),
        (lambda lines: lines[3].update(kld=[1, 2, 3]), "line 4: kld is not a finite number"),
        (lambda lines: lines[3]["kld"].update(total=9999.0), "they belong to another run"),
        (lambda lines: [line.pop("kld") for line in lines], "have no kld; they have kld, token_perplexity"),
    ],
)
def test_samples_that_do_not_match_are_refused(folder, compare, damage, reason):
    write(folder, *divergent("base", seed=1))
    write(folder, *divergent("other", size=0.05, seed=3))
    content, lines = divergent("b", size=0.05, seed=2)
    damage(lines)
    if len(lines) == 19:  # a consistent run of fewer windows
        content["results"][TASK]["kld,none"] = sum(line["kld"]["total"] for line in lines) / 400 / 19
    write(folder, content, lines)
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base", "--format", "json")
    record = json_of(out)["b"]
    assert (record["difference"], record["verdict"]) == (None, "no pair")
    assert reason in record["versus_note"]
    assert "no pair: b: " in out.err


@pytest.mark.parametrize("text", [b"", b"{", b"[1]\n", b"\xff\xfe\n", b"[" * 100_000, b"null\n"])
def test_malformed_sample_files_are_refused(folder, compare, text):
    write(folder, *divergent("base", seed=1))
    file = write(folder, *divergent("b", size=0.05, seed=2))
    beside = next(file.parent.glob("samples_*.jsonl"))
    beside.write_bytes(text)
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base")
    assert out.code == 2
    assert str(beside) in out.err
    assert len(out.err.splitlines()[-1]) < 500
    assert "Traceback" not in out.err


def test_results_over_other_tokens_or_references_form_no_pair(folder, compare):
    write(folder, *divergent("base", seed=1))
    write(folder, *divergent("same", size=0.05, seed=2))
    write(folder, *divergent("tokens", size=0.05, seed=3, tokens="other"))
    write(folder, *divergent("reference", size=0.05, seed=4, reference="another"))
    for extra in ([], ["--allow-mixed"]):
        out = compare("table", folder.path, "--metric", "kld", "--versus", "base", "--format", "json", *extra)
        assert {label: r["verdict"] for label, r in json_of(out).items()} == {
            "base": "baseline", "same": "worse", "tokens": "no pair", "reference": "no pair",
        }  # fmt: skip
        assert "tokens " in json_of(out)["tokens"]["versus_note"]
        assert "reference BF16 in vllm" in json_of(out)["reference"]["versus_note"]
    perplexity = compare("table", folder.path, "--metric", "token_perplexity", "--versus", "base", "--format", "json")
    assert json_of(perplexity)["reference"]["verdict"] == "worse", "a perplexity needs no reference"


def test_unknown_and_ambiguous_labels_are_refused(folder, compare):
    fill(folder)
    several = compare("table", folder.path, "--metric", "kld", "--versus", "exl3")
    assert several.code == 1
    assert "several models have such a label: EXL3 3.0bpw, EXL3 4.0bpw" in several.err
    nobody = compare("table", folder.path, "--metric", "kld", "--versus", "GGUF Q4_M")
    assert nobody.code == 1
    assert "did you mean GGUF Q4_K_M" in nobody.err
    assert compare("table", folder.path, "--metric", "kld", "--versus", "bf16", "--format", "md").code == 0


# ------------------------------------------------------------------ the command, on documents


def documents(name, values, metric="acc"):
    return [
        {"doc_id": i, "doc": {"q": i}, "filter": "none", "metrics": [metric], metric: value,
         "doc_hash": sha(f"{name} {i}"), "prompt_hash": sha(f"p {name} {i}"), "target_hash": sha("t")}
        for i, value in enumerate(values)
    ]  # fmt: skip


def add_task(folder, label, task, metric, values, figure, **keywords):
    content = suite(label, tasks=(task,), limit=len(values), **keywords)
    content["results"][task][f"{metric},none"] = figure
    return write(folder, content, documents(task, values, metric), task)


def test_accuracies_are_tested_by_mcnemar(folder, compare):
    rng = np.random.default_rng(3)
    base = (rng.random(300) < 0.6).astype(float)
    other = np.where(rng.random(300) < 0.85, base, 0.0)
    for label, values in (("base", base), ("other", other), ("same", base)):
        add_task(folder, label, "hellaswag", "acc", values.tolist(), float(values.mean()))
    records = json_of(
        compare("table", folder.path, "--metric", "hellaswag/acc", "--versus", "base", "--format", "json")
    )
    b, c = int(((other == 1) & (base == 0)).sum()), int(((other == 0) & (base == 1)).sum())
    assert records["other"]["p"] == pytest.approx(stats.binomtest(b, b + c).pvalue)
    assert records["other"]["versus_method"] == f"exact McNemar, {b} to {c}"
    assert records["other"]["difference"] == pytest.approx((b - c) / 300)
    assert records["other"]["verdict"] == "worse"
    assert (records["same"]["verdict"], records["same"]["p"]) == ("not told apart", 1.0)


def test_other_figures_are_bootstrapped_over_documents(folder, compare):
    rng = np.random.default_rng(3)
    base = rng.random(80)
    other = base + rng.normal(0.02, 0.05, 80)
    for label, values in (("base", base), ("other", other)):
        add_task(folder, label, "hellaswag", "acc", values.tolist(), float(values.mean()))
    record = json_of(compare("table", folder.path, "--metric", "hellaswag/acc", "--versus", "base", "--format", "json"))
    expected = stats.ttest_rel(other, base)
    assert record["other"]["p"] == pytest.approx(expected.pvalue, rel=0.2)
    assert record["other"]["difference_low"] == pytest.approx(expected.confidence_interval(0.95).low, abs=0.001)
    assert "80 documents" in record["other"]["versus_method"]


def test_rolling_perplexities_are_bootstrapped_over_documents(folder, compare):
    """(log-likelihood, words) per document, as the harness logs them for wikitext."""
    rng = np.random.default_rng(3)
    words = rng.integers(500, 5000, 62).astype(float)
    hard = rng.normal(2.5, 0.2, 62)
    for label, more in (("base", 0.0), ("other", 0.03)):
        total = -words * (hard + more + rng.normal(0, 0.003, 62))
        pairs = [[float(t), int(w)] for t, w in zip(total, words, strict=True)]
        add_task(folder, label, "wikitext", "word_perplexity", pairs, math.exp(-total.sum() / words.sum()))
    chosen = ("--metric", "wikitext/word_perplexity", "--versus", "base", "--format", "json")
    record = json_of(compare("table", folder.path, *chosen))["other"]
    assert record["verdict"] == "worse"
    assert record["difference_low"] < record["difference"] < record["difference_high"]
    assert record["difference"] == pytest.approx(record["value"] - record["value"] / math.exp(0.03), rel=0.05)


def test_a_group_pairs_the_documents_of_its_subtasks(folder, compare):
    """mmlu with nine subtasks: 1,450 documents, one file per subtask."""
    truth = {}
    for number, label in enumerate(("base", "other")):
        content, rng, values = suite(label, tasks=("mmlu",)), np.random.default_rng(5), {}
        file = folder.write(content)
        for task, config in content["configs"].items():
            count = content["n-samples"][task]["effective"]
            correct = (rng.random(count) < 0.6).astype(float)
            values[task] = correct * (rng.random(count) < 1 - 0.1 * number)
            write_samples(file, documents(task, values[task].tolist()), task)
            content["results"][task]["acc,none"] = float(values[task].mean())
            assert config["task"] == task
        truth[label] = np.concatenate(list(values.values()))
        content["results"]["mmlu"]["acc,none"] = content["groups"]["mmlu"]["acc,none"] = float(truth[label].mean())
        file.write_text(json.dumps(content))
    record = json_of(compare("table", folder.path, "--metric", "mmlu/acc", "--versus", "base", "--format", "json"))
    lost = int(((truth["other"] == 0) & (truth["base"] == 1)).sum())
    gained = int(((truth["other"] == 1) & (truth["base"] == 0)).sum())
    assert record["other"]["versus_method"] == f"exact McNemar, {gained} to {lost}"
    assert len(truth["base"]) == 1450


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda line: line.update(doc_hash=sha("x")), "1 differ, document 5 of hellaswag the first (its text)"),
        (lambda line: line.update(prompt_hash=sha("x")), "(its prompt)"),
        (lambda line: line.update(target_hash=sha("x")), "(its answer)"),
        (lambda line: line.pop("doc_hash"), "line 6: has no doc_hash"),
        (lambda line: line.update(doc_id="x"), "line 6: has no doc_id"),
        (lambda line: line.update(acc=float("nan")), "acc is not a finite number"),
    ],
)  # fmt: skip
def test_other_documents_form_no_pair(folder, compare, damage, reason):
    values = [1.0, 0.0] * 20
    for label in ("base", "good", "bad"):
        add_task(folder, label, "hellaswag", "acc", values, 0.5)
    file = sorted(folder.path.glob("m003/samples_*"))[0]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    damage(lines[5])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = compare("table", folder.path, "--metric", "hellaswag/acc", "--versus", "base", "--format", "json")
    assert json_of(out)["bad"]["verdict"] == "no pair"
    assert reason in out.err


def test_samples_of_the_chosen_filter_are_used(folder, compare):
    for label, strict, flexible in (("base", 1.0, 0.0), ("other", 0.0, 1.0)):
        content = suite(label, tasks=("gsm8k",), limit=40)
        content["results"]["gsm8k"].update(
            {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}
        )
        lines = []
        for name, value in (("strict-match", strict), ("flexible-extract", flexible)):
            lines += [{**line, "filter": name} for line in documents("gsm8k", [value] * 40, "exact_match")]
        write(folder, content, lines, "gsm8k")
    for name, verdict in (("strict-match", "worse"), ("flexible-extract", "better")):
        chosen = ("--metric", f"gsm8k/exact_match,{name}", "--versus", "base", "--format", "json")
        assert json_of(compare("table", folder.path, *chosen))["other"]["verdict"] == verdict


def test_a_figure_that_samples_do_not_add_up_to_is_refused(folder, compare):
    for label in ("base", "other"):
        add_task(folder, label, "hellaswag", "acc", [1.0, 0.0] * 20, 0.9)
    out = compare("table", folder.path, "--metric", "hellaswag/acc", "--versus", "base")
    assert out.code == 2
    assert "give 0.5, but the result file has 0.9" in out.err


def test_versus_refuses_a_mean_of_tasks(folder, compare):
    for label in ("base", "other"):
        folder.write(suite(label, tasks=("hellaswag",)))
    chosen = ("--metric", "hellaswag/acc", "--metric", "hellaswag/acc_norm", "--mean", "--versus", "base")
    out = compare("table", folder.path, *chosen)
    assert out.code == 1
    assert "--mean" in out.err


@pytest.mark.parametrize("name", ["../../secret", "a/b", "a\0b", "x" * 300])
def test_a_task_name_cannot_lead_to_another_folder(folder, compare, name):
    for label in ("base", "other"):
        content, _ = divergent(label)
        for key in ("results", "configs", "higher_is_better", "n-samples"):
            content[key][name] = content[key].pop(TASK)
        folder.write(content)
    out = compare("table", folder.path, "--metric", "kld", "--versus", "base")
    assert out.code == 2
    assert "Traceback" not in out.err
