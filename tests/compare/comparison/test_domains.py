"""`compare domains`: losses by domain, the worst one, Kendall's τ against scipy and by hand."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from tests.compare.conftest import result
from tests.compare.divergence_files import TASK, divergent

# Perplexities by domain; the original's are 8, 4 and 20
PERPLEXITY = {
    "BF16": (8.0, 4.0, 20.0),
    "Q8_0": (8.04, 4.01, 20.02),  # 0.5 %, 0.25 %, 0.1 %
    "Q5_K_M": (8.16, 4.20, 20.4),  # 2 %, 5 %, 2 %
    "Q4_K_M": (8.4, 4.16, 20.6),  # 5 %, 4 %, 3 %
}
DOMAINS = ("prose", "code", "german")


def add(folder, figures):
    for label, values in figures.items():
        for domain, value in zip(DOMAINS, values, strict=True):
            family, bpw = ("full precision", 16.0) if label == "BF16" else ("GGUF", 4.0 + len(label) / 10)
            content = result(label, family, label, bpw, value, task=f"domain_{domain}", tokens=domain)
            folder.write(content)


@pytest.fixture
def domains(folder, compare):
    def run(*arguments):
        outcome = compare("domains", folder.path, "--format", "json", *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


def test_losses_are_against_the_original_of_each_domain(folder, domains):
    add(folder, PERPLEXITY)
    found = domains()
    assert (found["metric"], found["unit"], sorted(found["domains"])) == ("token_perplexity", "%", sorted(DOMAINS))
    losses = {model["label"]: model["losses"] for model in found["models"]}
    for label, values in PERPLEXITY.items():
        for domain, value, original in zip(DOMAINS, values, PERPLEXITY["BF16"], strict=True):
            assert losses[label][domain]["value"] == pytest.approx((value / original - 1) * 100)
    worst = {model["label"]: model["worst"] for model in found["models"]}
    assert worst == {"BF16": found["domains"][0], "Q8_0": "prose", "Q5_K_M": "code", "Q4_K_M": "prose"}


def test_kendalls_tau_worked_by_hand(folder, domains):
    """Of three pairs of models, code orders one the other way round: (2 − 1) / 3; the original takes no part."""
    add(folder, PERPLEXITY)
    taus = {frozenset((a["first"], a["second"])): a["kendall_tau"] for a in domains()["agreement"]}
    assert set(taus) == {frozenset(pair) for pair in combinations(DOMAINS, 2)}
    assert taus[frozenset(("prose", "german"))] == pytest.approx(1)
    assert taus[frozenset(("prose", "code"))] == pytest.approx(1 / 3)
    assert domains()["agreement"][0]["kendall_tau"] == min(taus.values())


def test_missing_figures_are_unknown_and_have_no_worst_domain(folder, domains, compare):
    add(folder, {"BF16": PERPLEXITY["BF16"], "Q8_0": PERPLEXITY["Q8_0"]})
    folder.write(result("Q2_K", "GGUF", "Q2_K", 2.9, 9.0, task="domain_prose", tokens="prose"))
    found = domains()
    half = next(model for model in found["models"] if model["label"] == "Q2_K")
    assert half["worst"] is None
    assert half["losses"]["code"]["value"] is None
    assert found["agreement"] == []
    text = compare("domains", folder.path).out
    assert "| 12.5 | – | – |" in text
    assert "Too few models" in text


def test_each_domain_has_its_own_noise_floor(folder, domains, compare):
    for domain, floor in (("prose", 1e-4), ("code", 2e-3)):
        for label, family, bpw, size, role in (
            ("BF16", "full precision", 16.0, floor, "reference"), ("Q8_0", "GGUF", 8.5, 8e-4, "comparison"),
        ):  # fmt: skip
            content, _ = divergent(label, family, bpw, size, role=role, tokens=domain, reference=domain)
            text = json.dumps(content).replace(f'"{TASK}"', f'"domain_{domain}"')
            folder.write(json.loads(text))
    found = domains()
    floors = dict(zip(found["domains"], found["noise_floors"], strict=True))
    assert floors["prose"] < floors["code"]
    noise = next(model["losses"] for model in found["models"] if model["label"] == "Q8_0")
    assert not noise["prose"]["in_noise"]
    assert noise["code"]["in_noise"]
    assert "≈" in compare("domains", folder.path).out


@pytest.mark.usefixtures("undrawn")
def test_report_has_a_section_with_the_worst_domain_marked(folder, compare, tmp_path):
    add(folder, PERPLEXITY)
    metrics = [f"--metric=domain_{domain}/token_perplexity" for domain in DOMAINS]
    assert compare("report", folder.path, *metrics, "-o", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "By domain" in page
    assert "5 ▲" in page
    assert "Kendall" in page
    assert compare("report", folder.path, metrics[0], "-o", tmp_path / "one.html").code == 0
    assert "By domain" not in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tasks", "domain_prose"), 2, "no two tasks domain_"),
        (("--tasks", "domain_prose,domain_x"), 1, "--tasks domain_x: no result of it has token_perplexity"),
        (("--mean",), 1, "compare domains shows one metric"),
        (("--metric", "acc"), 2, "no two tasks domain_"),
    ],
)
def test_mistakes_are_one_line(folder, compare, arguments, code, message):
    add(folder, PERPLEXITY)
    outcome = compare("domains", folder.path, *arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
