"""`compare choose`: every sentence recomputed from the result files by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compare.comparison.choice import times_as_many
from compare.comparison.significance import PairedDifference
from tests.compare.conftest import result
from tests.compare.divergence_files import TASK, divergent, fill, write
from tests.compare.harness_files import suite

GIB = 1024**3


@pytest.fixture
def chosen(folder, compare):
    """Runs `compare choose --format json`; returns the sentences by kind."""

    def choose(*arguments: str) -> dict[str, dict]:
        outcome = compare("choose", folder.path, "--format", "json", *arguments)
        assert outcome.code == 0, outcome.err
        (answer,) = outcome.json
        kinds = [sentence["kind"] for sentence in answer["sentences"]]
        assert len(kinds) == len(set(kinds))
        assert all(s["text"].endswith(".") for s in answer["sentences"])
        return {sentence["kind"]: sentence for sentence in answer["sentences"]}

    return choose


def files(path: Path) -> dict[str, dict]:
    """The result files by label, with what the sentences rest on."""
    found = {}
    for file in path.rglob("results_*.json"):
        content = json.loads(file.read_text())
        quantization, figures = content["config"]["quantization"], content["results"][TASK]
        found[quantization["label"]] = {
            "kld": figures["kld,none"], "error": figures["kld_stderr,none"], "file": file,
            "bytes": quantization["weight_bytes"], "cache": quantization["kv_bytes_per_token"],
            "samples": file.with_name(f"samples_{TASK}_{file.stem.removeprefix('results_')}.jsonl"),
        }  # fmt: skip
    return found


def test_every_sentence_follows_from_the_files(folder, chosen):
    fill(folder)
    answer, by_label = chosen("--budget", "6", "--context", "8192", "--max-loss", "0.02"), files(folder.path)
    floor = max(2.1e-6, by_label["BF16 GGUF"]["kld"], by_label["BF16"]["kld"])
    quantized = {name: f for name, f in by_label.items() if not name.startswith("BF16")}

    inside = {name for name, f in quantized.items() if f["kld"] <= floor}
    assert set(answer["within_noise"]["models"]) == inside == {"GGUF Q8_0"}
    assert answer["within_noise"]["figures"]["high"] == pytest.approx(floor)

    # with one cache for all models the smallest file is the smallest in memory
    small = min((name for name, f in by_label.items() if f["kld"] <= 0.02), key=lambda n: by_label[n]["bytes"])
    assert answer["smallest"]["models"] == [small]
    found, expected = answer["smallest"]["figures"], by_label[small]
    assert (found["value"], found["loss"], found["loss_stderr"]) == (
        expected["kld"],
        expected["kld"],
        expected["error"],
    )
    assert found["bytes"] == expected["bytes"] + 8192 * expected["cache"]

    fitting = {n for n, f in by_label.items() if f["bytes"] + 8192 * f["cache"] <= 6 * GIB}
    best = min(fitting, key=lambda n: by_label[n]["kld"])
    assert answer["best_in_budget"]["models"] == [best]
    assert set(answer["best_in_budget"]["figures"]["fitting"]) == fitting
    assert set(answer["best_in_budget"]["figures"]["too_large"]) == by_label.keys() - fitting

    on_frontier = {
        n for n, f in by_label.items()
        if not any(g["bytes"] <= f["bytes"] and g["kld"] < f["kld"] for g in by_label.values())
    }  # fmt: skip
    assert set(answer["sizes"]["models"]) == on_frontier
    sizes = [by_label[n]["bytes"] for n in answer["sizes"]["models"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "not measured" in answer["speed"]["text"]


def test_rivals_of_the_best_are_those_that_the_windows_cannot_separate(folder, chosen):
    for label, size, seed in (("A", 0.010, 5), ("B", 0.0101, 5), ("C", 0.03, 5)):
        content, lines = divergent(label, "GGUF", 4.5 + seed / 100, size, seed=seed)
        rng = np.random.default_rng(ord(label))
        for line in lines:  # noise of each window's own
            line["kld"]["total"] *= 1 + 0.05 * rng.standard_normal()
        total = sum(line["kld"]["total"] for line in lines)
        content["results"][TASK]["kld,none"] = total / sum(line["kld"]["count"] for line in lines)
        write(folder, content, lines)
    answer = chosen("--budget", "80", "--context", "1024")
    (best,), by_label = answer["best_in_budget"]["models"], files(folder.path)
    rival = "B" if best == "A" else "A"
    assert answer["not_told_apart"]["models"] == [rival]

    def blocks(label: str) -> np.ndarray:  # of four windows, as the files say
        sums = [json.loads(line)["kld"] for line in by_label[label]["samples"].read_text().splitlines()]
        return np.array([s["total"] / s["count"] for s in sums]).reshape(-1, 4).mean(axis=1)

    difference = blocks(rival) - blocks(best)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    # the interval's t at 4 degrees of freedom takes the place of the normal quantile
    wide = error * stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975)
    tokens = 20 * 2047 * ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * wide / difference.mean()) ** 2
    text = answer["not_told_apart"]["text"]
    if tokens <= 1000 * 20 * 2047:
        shown = float(text.split("about ")[1].split(" tokens")[0].replace(",", ""))
        assert shown == pytest.approx(tokens, rel=0.12)


def test_number_of_questions_gives_the_power_that_it_names():
    """At n = times · units, a difference of this size is found in 80 % of simulated tests."""
    value, error, units = 0.3, 0.25, 100
    z = stats.norm.ppf(0.975)
    times = times_as_many(PairedDifference(value, value - z * error, value + z * error, 0.2, units))
    n = times * units
    simulated = np.random.default_rng(0).normal(value, error * math.sqrt(units / n), 20_000)
    found = np.mean(np.abs(simulated) / (error * math.sqrt(units / n)) > z)
    assert found == pytest.approx(0.8, abs=0.01)
    assert times_as_many(PairedDifference(0.0, -1.0, 1.0, 1.0, units)) is None
    assert times_as_many(PairedDifference(0.1, None, None, None, 3)) is None


def test_losses_of_perplexity_are_per_cent_of_the_original(folder, chosen):
    folder.write(result("BF16", "full precision", "bfloat16", 16.0, 8.0))
    folder.write(result("Q8_0", "GGUF", "Q8_0", 8.5, 8.04))
    folder.write(result("Q4_K_M", "GGUF", "Q4_K_M", 4.85, 8.2))
    answer = chosen("--max-loss", "1 %")
    assert answer["smallest"]["models"] == ["Q8_0"]
    assert answer["smallest"]["figures"]["loss"] == pytest.approx(0.5)
    assert answer["smallest"]["figures"]["loss_stderr"] is None, "the text's error is not the loss's"
    assert chosen("--max-loss", "2.5%")["smallest"]["models"] == ["Q4_K_M"]
    none = chosen("--max-loss", "0.1")["smallest"]
    assert none["models"] == ["BF16"]
    assert "samples" in answer["within_noise"]["text"], "without samples nothing is said of chance"


def test_without_the_original_no_loss_is_known(folder, chosen):
    folder.write(result("Q8_0", "GGUF", "Q8_0", 8.5, 8.04))
    folder.write(result("Q4_K_M", "GGUF", "Q4_K_M", 4.85, 8.2))
    answer = chosen("--max-loss", "1")
    assert answer["smallest"]["models"] == []
    assert "unknown" in answer["smallest"]["text"]
    assert "original" in answer["smallest"]["text"]
    assert all(model["loss"] is None for model in answer["sizes"]["figures"]["models"])


def test_losses_of_accuracy_are_points(folder, chosen):
    for label, family, bpw, quality in (("BF16", "full precision", 16.0, 1.0), ("Q4", "GGUF", 4.8, 0.97)):
        folder.write(suite(label, family, bpw, quality, tasks=("hellaswag",)))
    answer = chosen("--metric", "hellaswag/acc", "--max-loss", "1 points")
    assert answer["smallest"]["models"] == ["Q4"]
    assert answer["smallest"]["figures"]["loss"] == pytest.approx(0.28 * 0.03 * 100)


def test_other_tokens_and_broken_models_are_never_chosen(folder, chosen):
    fill(folder, samples=False)
    content, _ = divergent("elsewhere", "GGUF", 1.0, 1e-7, tokens="other")
    folder.write(content)
    broken, _ = divergent("broken", "GGUF", 1.1, 1e-7, seed=3)
    broken["results"][TASK]["token_perplexity,none"] = math.nan
    folder.write(broken)
    answer = chosen("--budget", "80", "--context", "1024", "--max-loss", "10")
    assert answer["kept_apart"]["models"] == ["elsewhere"]
    assert answer["broken"]["models"] == ["broken"]
    named = {
        label for kind in ("smallest", "best_in_budget", "sizes", "within_noise") for label in answer[kind]["models"]
    }
    assert not named & {"elsewhere", "broken"}


def test_unknown_sizes_are_said_and_take_no_place(folder, chosen):
    fill(folder, samples=False)
    content, _ = divergent("unsized", "GGUF", None, 0.001)
    folder.write(content)
    answer = chosen("--max-loss", "10")
    assert answer["unknown_size"]["models"] == ["unsized"]
    assert "unsized" not in answer["sizes"]["models"]
    assert answer["smallest"]["models"] != ["unsized"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-loss", "1 %"), "--max-loss 1 %: expected a number of nats"),
        (("--max-loss", "-1"), "expected a number of nats"),
        (("--max-loss", "nan"), "expected a number of nats"),
        (("--allow-mixed",), "leave out --allow-mixed"),
        (("--metric", "kld", "--metric", "top1_agreement", "--max-loss", "1"), "name one --metric"),
        (("--metric", "mean_delta_p"), "nothing says whether a higher value is better"),
        (("--budget", "8"), "--budget needs --context"),
    ],
)
def test_mistakes_are_one_line(folder, compare, arguments, message):
    fill(folder, samples=False)
    outcome = compare("choose", folder.path, *arguments)
    assert outcome.code == 1
    assert not outcome.out
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_answer_stands_below_a_table_and_in_the_report(folder, compare, tmp_path):
    fill(folder, samples=False)
    sentence = "Within the noise of the original, 0 to "
    assert sentence in compare("table", folder.path, "--metric", "kld", "--choose").out
    assert sentence in compare("table", folder.path, "--metric", "kld", "--choose", "--format", "md").out
    refused = compare("table", folder.path, "--metric", "kld", "--choose", "--format", "csv")
    assert refused.code == 1
    assert "--choose has no place in csv" in refused.err
    compare("report", folder.path, "-o", tmp_path / "r.html")
    assert sentence in (tmp_path / "r.html").read_text()
