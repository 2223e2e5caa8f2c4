"""Metrics that need a stored reference: comparability, the noise floor, and how both are shown."""

from __future__ import annotations

import csv
import io

import pytest

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.plot.captions import caption
from compare.plot.series import arrange
from compare.results.divergence import read_divergence
from compare.results.reading import read_results
from tests.compare.conftest import result
from tests.compare.divergence_files import TASK, divergent, fill, write


def built(folder, metric="kld", **options):
    return build_comparison(read_results([folder.path]).records, Options(metrics=(metric,), **options))


def add(folder, *args, **kwargs):
    return write(folder, divergent(*args, **kwargs)[0])


def test_only_figures_from_the_same_reference_are_comparable(folder, compare):
    add(folder, "a", bpw=4.0)
    add(folder, "b", bpw=5.0)
    add(folder, "c", bpw=6.0, reference="another")
    out = compare("table", folder.path, "--metric", "kld", "--format", "json")
    assert {r["label"]: r["comparable"] for r in out.json} == {"a": True, "b": True, "c": False}
    assert "not all results are against the same reference" in out.err
    (apart,) = [line for line in out.err.splitlines() if "kept apart" in line]
    assert apart.endswith(": c")
    assert "reference BF16 in vllm 0.26.0 (bfloat16)" in apart
    perplexity = compare("table", folder.path, "--metric", "token_perplexity", "--format", "json")
    assert all(r["comparable"] for r in perplexity.json), "a perplexity needs no reference"
    mixed = compare("table", folder.path, "--metric", "kld", "--format", "json", "--allow-mixed")
    assert all(r["comparable"] for r in mixed.json)


def test_mixed_references_are_named_in_table_and_plot(folder, compare):
    """Table and picture name one reference, so with --allow-mixed they name the results from another."""
    add(folder, "a", bpw=4.0)
    add(folder, "b", bpw=5.0)
    add(folder, "c", bpw=6.0, reference="another")
    for mixed in ([], ["--allow-mixed"]):
        table = compare("table", folder.path, "--metric", "kld", "--format", "md", *mixed).out
        assert ("mixed as asked with others: c" in table) == bool(mixed)
    for mixed in (False, True):
        comparison = built(folder, allow_mixed=mixed)
        lines = [line for line in caption(comparison, arrange(comparison, False)) if "Mixed" in line]
        assert lines == (
            ["Mixed as asked, from another reference or over other tokens or samples than named above: c."]
            if mixed
            else []
        )


@pytest.mark.parametrize("metric", ["kld_p99", "top1_agreement", "mean_delta_p", "rms_delta_p", "ppl_ratio"])
def test_every_metric_that_needs_a_reference_is_kept_apart(folder, compare, metric):
    add(folder, "a", bpw=4.0)
    add(folder, "b", bpw=5.0, reference="another")
    out = compare("table", folder.path, "--metric", metric, "--format", "json")
    assert sorted(r["comparable"] for r in out.json) == [False, True]


def test_an_unnamed_reference_equals_no_other(folder, compare):
    for label in ("a", "b"):
        content, _ = divergent(label)
        del content["configs"][TASK]["metadata"]["divergence"]["reference"]["id"]
        folder.write(content)
    out = compare("table", folder.path, "--metric", "kld", "--format", "json")
    assert sorted(r["comparable"] for r in out.json) == [False, True]
    assert "reference not named" in out.err


def test_divergences_over_other_tokens_are_kept_apart(folder, compare):
    add(folder, "a", bpw=4.0)
    add(folder, "b", bpw=5.0, tokens="other")
    out = compare("table", folder.path, "--metric", "kld", "--format", "json")
    assert sorted(r["comparable"] for r in out.json) == [False, True]
    assert "not all results are over the same tokens" in out.err


def test_means_of_divergences_from_another_reference_are_kept_apart(folder, compare):
    for label, reference in (("a", "one"), ("b", "one"), ("c", "another")):
        content, _ = divergent(label, reference=reference)
        content["results"]["second"] = dict(content["results"][TASK])
        for key in ("configs", "higher_is_better", "n-samples", "versions"):
            content[key]["second"] = content[key][TASK]
        folder.write(content)
    chosen = ("--metric", f"{TASK}/kld", "--metric", "second/kld", "--mean", "--format", "json")
    out = compare("table", folder.path, *chosen)
    assert {r["label"]: r["comparable"] for r in out.json} == {"a": True, "b": True, "c": False}


def test_a_rerun_against_another_reference_is_reported(folder, compare):
    add(folder, "a", reference="one")
    add(folder, "a", reference="two", date=1_790_000_001.0)
    assert "other reference: BF16 in vllm" in compare("table", folder.path, "--metric", "kld").err


# ------------------------------------------------------------------ noise floor


def test_full_precision_in_two_engines_defines_the_noise_floor(folder):
    fill(folder, samples=False)
    comparison = built(folder)
    by_label = {p.record.label: p.y for p in comparison.points}
    assert comparison.noise_floor is not None
    assert comparison.noise_floor.low == 0
    assert comparison.noise_floor.high == max(by_label["BF16"], by_label["BF16 GGUF"])
    assert comparison.noise_floor.source_names == "BF16 in vllm, rounding; BF16 GGUF in llama.cpp"
    (notice,) = [line for line in comparison.notices if "noise floor" in line]
    assert "GGUF Q8_0" in notice
    assert "Q6_K" not in notice
    drawing = arrange(comparison, None)
    assert drawing.noise_floor is comparison.noise_floor
    assert not drawing.references, "no dashed line: the band stands for it"
    assert {p.record.label for p in drawing.points} == set(by_label) - {"BF16", "BF16 GGUF"}


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [("kld", 0, 0.3), ("top1_agreement", 0.7, 1), ("ppl_ratio", 0.7, 1.3), ("mean_delta_p", -0.3, 0.3),
     ("rms_delta_p", 0, 0.3)],
)  # fmt: skip
def test_noise_floor_lies_around_the_ideal_value(folder, metric, low, high):
    content, _ = divergent("BF16", "full precision", 16.0, role="reference")
    content["results"][TASK][f"{metric},none"] = {"top1_agreement": 0.7, "ppl_ratio": 1.3}.get(metric, 0.3)
    folder.write(content)
    add(folder, "q")
    floor = built(folder, metric).noise_floor
    assert (floor.low, floor.high) == (pytest.approx(low), pytest.approx(high))


def test_stored_rounding_is_the_noise_floor_without_the_references_own_result(folder):
    add(folder, "q")
    comparison = built(folder)
    assert comparison.noise_floor.high == 2.1e-6
    assert comparison.noise_floor.source_names == "BF16 in vllm, rounding"
    assert built(folder, "kld_max").noise_floor.high == 3e-4
    assert built(folder, "kld_p99").noise_floor is None, "no file has it"
    add(folder, "BF16", "full precision", 16.0, 1e-6, role="reference")
    assert built(folder).noise_floor.high == {p.record.label: p.y for p in built(folder).points}["BF16"]


def test_no_noise_floor_without_full_precision_or_for_other_metrics(folder):
    add(folder, "q", rounding=False)
    assert built(folder).noise_floor is None
    add(folder, "BF16", "full precision", 16.0, 1e-6, role="reference")
    assert built(folder, "token_perplexity").noise_floor is None


def test_another_model_in_full_precision_does_not_define_the_noise_floor(folder):
    for label, bpw in (("BF16", 16.0), ("q", 4.0), ("r", 5.0)):
        add(folder, label, "full precision" if label == "BF16" else "GGUF", bpw, rounding=False)
    add(folder, "small", "full precision", 16.0, 0.9, rounding=False, layer_parameters=1_000_000)
    assert built(folder).noise_floor.source_names == "BF16 in vllm"


def test_full_precision_alone_is_drawn_as_points(folder):
    add(folder, "BF16", "full precision", 16.0, 1e-6, role="reference")
    add(folder, "BF16 GGUF", "full precision", 16.0, 1e-4, engine="llama.cpp")
    drawing = arrange(built(folder), None)
    assert len(drawing.points) == 2
    assert drawing.noise_floor is None


def test_divergences_have_no_column_relative_to_a_baseline(folder, compare):
    fill(folder, samples=False)
    out = compare("table", folder.path, "--metric", "kld", "--format", "json")
    assert {r["relative_to_reference"] for r in out.json} == {None}
    assert "vs. ref." not in compare("table", folder.path, "--metric", "kld").out


# ------------------------------------------------------------------ plot and table


@pytest.mark.usefixtures("undrawn")
def test_divergences_have_a_logarithmic_axis_by_default(folder, compare, tmp_path):
    fill(folder, samples=False)
    content, _ = divergent("exact", bpw=7.0)
    content["results"][TASK]["kld,none"] = -1e-9
    folder.write(content)
    assert arrange(built(folder), None).log_y
    assert not arrange(built(folder, "top1_agreement"), None).log_y
    out = compare("plot", folder.path, "--metric", "kld", "-o", tmp_path / "a.png")
    assert out.code == 0
    assert "not drawn: exact: -1e-09 has no place on a logarithmic axis; --no-log-y draws it" in out.err
    linear = compare("plot", folder.path, "--metric", "kld", "-o", tmp_path / "b.png", "--no-log-y")
    assert "not drawn" not in linear.err


def test_divergences_without_positive_values_have_a_linear_axis(folder):
    content, _ = divergent("exact", rounding=False)
    content["results"][TASK]["kld,none"] = 0.0
    folder.write(content)
    drawing = arrange(built(folder), None)
    assert not drawing.log_y
    assert len(drawing.points) == 1


@pytest.mark.parametrize("extra", [pytest.param([], marks=pytest.mark.slow), ["--dark", "--no-log-y", "--pareto"]])
@pytest.mark.parametrize("suffix", ["png", pytest.param("svg", marks=pytest.mark.slow), "pdf", "html"])
def test_same_input_same_bytes(folder, compare, tmp_path, suffix, extra):
    fill(folder, samples=False)
    for name in ("a", "b"):
        done = compare("plot", folder.path, "--metric", "kld", "-o", tmp_path / f"{name}.{suffix}", *extra)
        assert done.code == 0, done.err
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_plot_caption_explains_the_noise_floor_band(folder, compare, tmp_path):
    from compare.plot.captions import texts

    fill(folder, samples=False)
    comparison = built(folder)
    around = texts(comparison, arrange(comparison, None), None)
    assert "reference: BF16 in vllm 0.26.0 (bfloat16)" in around.subtitle
    assert "noise floor" in " ".join(around.caption)
    assert "BF16 in vllm, rounding; BF16 GGUF in llama.cpp" in " ".join(around.caption)
    assert "GGUF Q8_0" in around.caption[-1]


def test_table_of_a_divergence_has_the_columns_beside_it(folder, compare):
    content, _ = divergent("q")
    content["results"][TASK].update({"kld_median,none": 0.0123, "kld_p99,none": 0.4567, "top1_agreement,none": 0.8765,
                                     "ppl_ratio,none": 1.0432})  # fmt: skip
    folder.write(content)
    out = compare("table", folder.path, "--metric", "kld", "--format", "md").out
    for words in ("Median", "99 %", "Top-1 agreement", "PPL ratio", "0.0123", "0.4567", "0.8765", "1.0432"):
        assert words in out
    (record,) = compare("table", folder.path, "--metric", "kld", "--format", "json").json
    assert (record["kld_median"], record["kld_p99"], record["ppl_ratio"]) == (0.0123, 0.4567, 1.0432)
    assert record["noise_floor_high"] == 2.1e-6
    for name in ("kld_median,none", "top1_agreement,none"):
        del content["results"][TASK][name]
    folder.write(content, "m001/results_2026-09-21T00-00-001.json")
    out = compare("table", folder.path, "--metric", "kld", "--format", "md").out
    assert "Median" not in out
    assert "99 %" in out
    assert "Median" not in compare("table", folder.path, "--metric", "kld_p99", "--format", "md").out


def test_table_marks_models_within_the_noise_floor(folder, compare):
    fill(folder, samples=False)
    lines = compare("table", folder.path, "--metric", "kld", "--format", "md").out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "| floor |" in rows["BF16"]
    assert "| within |" in rows["GGUF Q8\\_0"]
    assert "within" not in rows["GGUF Q6\\_K"]


def test_metrics_of_different_columns_make_one_csv(folder, compare):
    fill(folder, samples=False)
    out = compare("table", folder.path, "--metric", "kld", "--metric", "token_perplexity", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out.out)))
    assert {row["metric"] for row in rows} == {"kld,none", "token_perplexity,none"}
    assert all(bool(row["kld_median"]) == (row["metric"] == "kld,none") for row in rows)


def test_notices_of_several_metrics_appear_once(folder, compare):
    fill(folder, samples=False)
    out = compare("table", folder.path, "--metric", "kld", "--metric", "top1_agreement")
    assert out.err.count("within the noise floor") == 2, "one per metric"
    assert out.err.count("top1_agreement: within the noise floor") == 1


# ------------------------------------------------------------------ untrusted content


def divergence_block(**changes):
    content, _ = divergent()
    block = content["configs"][TASK]["metadata"]["divergence"]
    for path, value in changes.items():
        at, *rest = path.split("__")
        if rest:
            block[at][rest[0]] = value
        else:
            block[at] = value
    return read_divergence({"divergence": block})


def test_sound_divergence_is_read():
    divergence = divergence_block()
    assert divergence.role == "comparison"
    assert divergence.quantile(50) == dict(divergence.quantiles)[50] > 0
    assert divergence.histogram.total == 8000
    assert sum(n * w for n, w in zip(divergence.histogram.densities(), [0.25] * 48, strict=True)) == pytest.approx(1.0)
    assert [b.low for b in divergence.buckets] == [0, 0.25, 0.5, 0.75, 0.95]
    assert sum(b.tokens for b in divergence.buckets) == 8000


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"role": "boss"}, "role"),
        ({"rounding": [1]}, "rounding"),
        ({"quantiles": {"50": float("nan")}}, "quantiles"),
        ({"quantiles": {"50": 0.1, "75": 0.05}}, "quantiles"),
        ({"quantiles": {"0": 0.1}}, "quantiles"),
        ({"quantiles": {"half": 0.1}}, "quantiles"),
        ({"quantiles": {"nan": 0.1}}, "quantiles"),
        ({"quantiles": [0.1]}, "quantiles"),
        ({"histogram__counts": [1, 2]}, "histogram"),
        ({"histogram__counts": [-1] * 48}, "histogram"),
        ({"histogram__counts": [0] * 48, "histogram__below": 0, "histogram__above": 0}, "histogram"),
        ({"histogram__counts": [1.5] * 48}, "histogram"),
        ({"histogram__counts": [10**400] * 48}, "histogram"),
        ({"histogram__below": None}, "histogram"),
        ({"histogram__log10_edges": [0.0] * 49}, "histogram"),
        ({"histogram__log10_edges": [float("inf")] * 49}, "histogram"),
        ({"histogram__log10_edges": list(range(1000, 1049))}, "histogram"),
        ({"histogram__log10_edges": "x"}, "histogram"),
        ({"by_confidence": 7}, "buckets"),
        ({"by_confidence": [None, {"from": 1, "to": 0, "tokens": 3}, {"from": 0, "to": 1, "tokens": -3}]}, "buckets"),
        ({"by_confidence": [{}] * 10_000}, "buckets"),
    ],
)
def test_unsound_divergence_values_are_left_out(change, lost):
    divergence = divergence_block(**change)
    assert not getattr(divergence, lost)
    assert getattr(divergence_block(), lost)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("value", [None, 1, "x", [], {}, {"reference": 1}, {"reference": {"id": ["x"]}}])
@pytest.mark.parametrize("command", [("table",), ("plot", "-o", "OUT.png"), ("report", "-o", "OUT.html")])
def test_a_malformed_divergence_block_does_not_stop_a_command(folder, compare, tmp_path, value, command):
    content = result()
    content["results"][TASK]["kld,none"] = 0.1
    content["configs"][TASK]["metadata"]["divergence"] = value
    folder.write(content)
    name, *rest = [str(part).replace("OUT", str(tmp_path / "out")) for part in command]
    assert compare(name, folder.path, "--metric", "kld", *rest).code == 0
