"""`compare attribute FILE`: shares and sentences worked by hand, hostile files."""

from __future__ import annotations

import csv
import io
import json

import pytest


def content(**changes):
    rows = [("layer 0 q", 0, "q", 100, 0.31), ("layer 0 v", 0, "v", 100, 0.11), ("layer 1 q", 1, "q", 800, 0.21)]
    return {
        "format": "lmeval-ext attribution", "version": 1, "original": "BF16",
        "quantized": {"label": "Q4", "scheme": "nvfp4a16"}, "reference": {"id": "x", "label": "BF16"},
        "task": "wiki2_strided", "windows": 4, "scored_tokens": 1000, "by": "matrix",
        "base": {"kld": 0.01, "stderr": None}, "whole": {"kld": 0.51, "stderr": 0.02}, "additivity": 1.2,
        "parts": [
            {"name": n, "layer": layer, "kind": kind, "matrices": 1, "weights": w, "kld": kld, "stderr": 0.001}
            for n, layer, kind, w, kld in rows
        ],
    } | changes  # fmt: skip


@pytest.fixture
def show(tmp_path, compare):
    def run(data, *arguments):
        file = tmp_path / "costs.json"
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        return compare("attribute", file, *arguments)

    return run


def test_costs_are_beyond_the_originals_own_divergence(show):
    rows = list(csv.DictReader(io.StringIO(show(content(), "--format", "csv").out)))
    assert [row["part"] for row in rows] == ["layer 0 q", "layer 1 q", "layer 0 v"]
    assert [float(row["cost"]) for row in rows] == pytest.approx([0.3, 0.2, 0.1])
    assert [float(row["share"]) for row in rows] == pytest.approx([0.5, 1 / 3, 1 / 6])
    assert [float(row["per_weight"]) for row in rows] == pytest.approx([5, (1 / 3) / 0.8, (1 / 6) / 0.1])


def test_sentences_say_what_adds_up_and_which_parts_to_keep(show):
    shown = show(content(), "--top", "1").out
    assert "All parts quantized: 0.51 ± 0.02 nats; none: 0.01 nats" in shown
    assert "add up to 1.20 of the cost of all together" in shown
    assert "1 of 3 parts have 50% of the cost and 10% of the weights" in shown
    assert "| 2 others | | 0.3 | 50.0% | |" in shown


def test_unknown_costs_leave_shares_unknown(show):
    data = content(additivity=None)
    data["parts"][1]["kld"] = None
    shown = show(data).out
    assert "Unknown: the cost of 1 parts" in shown
    assert "| layer 0 q | 100 | 0.3 ± 0.001 | – | – |" in shown
    assert "of the weights" not in shown
    assert "add up" not in shown


def test_picture_is_drawn_by_layer_or_as_bars(show, tmp_path):
    assert show(content(), "--plot", tmp_path / "lines.svg").code == 0
    bars = content(by="kind")
    for part in bars["parts"]:
        part["layer"] = None
    assert show(bars, "--plot", tmp_path / "bars.svg").code == 0
    texts = [(tmp_path / name).read_text() for name in ("lines.svg", "bars.svg")]
    assert all("most: layer 0 q, 0.3 nats" in text for text in texts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a file of compare attribute"),
        (content(parts=None), "not a file of compare attribute"),
        (content(version=2), "version 2; this release reads version 1"),
    ],
)
def test_other_files_are_one_line(show, data, message):
    outcome = show(data)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_hostile_values_are_unknown(show):
    data = content(base=[], whole={"kld": "1"}, windows="x")
    data["parts"].append({"name": 3, "layer": -1, "weights": 1e400, "kld": True})
    assert show(data).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantized", "x"), "--quantized is about measuring, which needs --original DIR too"),
        (("--original", "x"), "--original needs --quantized DIR too"),
        (("--plot", "x.txt"), "expected a name that ends in"),
        (("--plot", "x.html"), "expected a name that ends in .png, .svg or .pdf"),
    ],
)
def test_mistakes_are_one_line(show, arguments, message):
    outcome = show(content(), *arguments)
    assert outcome.code == 1
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
