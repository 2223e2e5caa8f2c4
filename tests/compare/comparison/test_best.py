"""The Pareto frontier, the memory budget, and models of different size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compare.comparison.best import frontier
from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.comparison.memory import Budget, Fit, fit, longest_context
from compare.comparison.model_sizes import model_clusters
from compare.comparison.point import Point
from compare.plot.series import arrange
from compare.results.reading import read_results
from compare.results.records import KVCacheSize, Quantization, Record

GIB = 1024**3


def point(x: float | None, y: float | None, group: int = 0) -> Point:
    return Point(Record("m", "t", {}), x, y, None, group)


def places(points: list[Point]) -> list[tuple[float | None, float | None]]:
    return [(p.x, p.y) for p in points]


def test_frontier_worked_by_hand():
    points = [point(4, 9), point(2, 12), point(3, 12), point(5, 9), point(6, 8), point(1, None), point(None, 1)]
    assert places(frontier(points, higher_is_better=False)) == [(2, 12), (4, 9), (6, 8)]
    assert places(frontier(points, higher_is_better=True)) == [(2, 12)]


def test_frontier_keeps_equal_points_and_ignores_incomparable_ones():
    assert len(frontier([point(2, 5), point(2, 5)], higher_is_better=False)) == 2
    assert places(frontier([point(2, 5), point(1, 1, group=1)], higher_is_better=False)) == [(2, 5)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25), st.booleans())
def test_frontier_equals_the_pairwise_definition(pairs, higher):
    """Checks every pair of points against the definition of dominance."""
    points = [point(float(x), float(y)) for x, y in pairs]

    def dominates(a: Point, b: Point) -> bool:
        assert None not in (a.x, a.y, b.x, b.y)
        good_a, good_b = (a.y, b.y) if higher else (-a.y, -b.y)
        return a.x <= b.x and good_a >= good_b and (a.x, good_a) != (b.x, good_b)

    expected = [p for p in points if not any(dominates(other, p) for other in points)]
    assert sorted(places(frontier(points, higher))) == sorted(places(expected))


@pytest.mark.parametrize(
    ("weights", "kv", "expected"),
    [
        (8 * GIB - 8192 * 131_072, 131_072, Fit.FITS),  # 7 GiB + 1 GiB: exactly 8 GiB
        (8 * GIB - 8192 * 131_072 + 1, 131_072, Fit.TOO_LARGE),
        (8_000_000_000, 1, Fit.FITS),  # 8 × 10⁹ bytes are less than 8 × 1024³
        (4 * GIB, None, Fit.UNKNOWN),
        (9 * GIB, None, Fit.TOO_LARGE),  # too large without any cache
        (None, 131_072, Fit.UNKNOWN),
    ],
)
def test_fit_worked_by_hand(weights, kv, expected):
    assert fit(Quantization(weight_bytes=weights, kv_bytes_per_token=kv), Budget(8, 8192)) is expected


def add_three(folder):
    """8.0, 6.0 and 4.0 GiB of weights; 1 GiB of cache at 8,192 tokens."""
    for label, gib, ppl in (("large", 8.0, 8.0), ("middle", 6.0, 8.5), ("small", 4.0, 9.5)):
        folder.add(label, "GGUF", label, gib, ppl, weight_bytes=int(gib * GIB), file_bpw=None)
    folder.add("mystery", "GGUF", "m", 3.0, 8.1, kv_bytes_per_token=None, file_bpw=None, weight_bytes=3 * GIB,
               notes=["kv_bytes_per_token unknown: sliding-window attention"])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 3 GiB are left; 128 KiB a token
        ({"kv_cache": KVCacheSize(((131_072, None),))}, "24,576"),
        ({"kv_bytes_per_token": 131_072}, "24,576"),
        # at most 1,024 tokens of 1 MiB in windows (1 GiB), 2 GiB of 64 KiB a token
        ({"kv_cache": KVCacheSize(((1024**2, 1024), (65_536, None)))}, "32,768"),
        # a state of 1 GiB comes first
        ({"kv_cache": KVCacheSize(((131_072, None),), state_bytes=GIB)}, "16,384"),
        ({"kv_cache": KVCacheSize(((131_072, None),), upper_bound=True)}, "at least 24,576"),
        ({"kv_cache": KVCacheSize(((1024**2, 1024),))}, "any"),
        ({"kv_cache": KVCacheSize((), state_bytes=4 * GIB)}, "0"),
        ({"weight_bytes": 9 * GIB}, "0"),
        ({}, "None"),
        ({"weight_bytes": None, "kv_bytes_per_token": 1}, "None"),
    ],
)
def test_longest_context_worked_by_hand(changes, expected):
    assert str(longest_context(Quantization(**({"weight_bytes": 5 * GIB} | changes)), 8)) == expected


@pytest.mark.usefixtures("undrawn")
def test_budget_names_the_best_model_known_to_fit(folder, compare, tmp_path):
    add_three(folder)
    out = compare("plot", folder.path, "--budget", 8, "--context", 8192, "-o", tmp_path / "p.svg")
    assert out.code == 0
    assert "best within 8 GB (× 1024³ bytes) with 8,192 tokens of context: middle" in out.err
    assert "6.00 GB of weights + 1.00 GB of KV cache (bfloat16)" in out.err
    assert "too large for 8 GB: large" in out.err
    assert "unknown whether it fits: mystery: kv_bytes_per_token unknown: sliding-window attention" in out.err
    larger = compare("plot", folder.path, "--budget", 8, "--context", 16384, "-o", tmp_path / "p.svg")
    assert "16,384 tokens of context: middle" in larger.err, "6 + 2 GiB are exactly 8"
    assert "tokens of context: small" in compare("table", folder.path, "--budget", 8, "--context", 16385).err


def test_budget_adds_memory_and_fit_to_the_table(folder, compare):
    add_three(folder)
    out = compare("table", folder.path, "--budget", 8, "--context", 8192, "--format", "json")
    assert {r["label"]: r["fits"] for r in out.json} == {
        "large": "too large", "middle": "fits", "small": "fits", "mystery": "unknown",
    }  # fmt: skip
    assert out.by_label()["middle"]["memory_bytes"] == 7 * GIB
    assert out.by_label()["mystery"]["memory_bytes"] is None
    assert "fits, best" in compare("table", folder.path, "--budget", 8, "--context", 8192).out


def test_best_follows_the_direction_of_the_metric(folder, compare):
    from tests.compare.conftest import result

    for label, accuracy in (("a", 0.6), ("b", 0.7)):
        content = result(label, "GGUF", label, 4.0, 9.0)
        content["results"]["wiki2_strided"]["top1_accuracy,none"] = accuracy
        folder.write(content)
    out = compare("table", folder.path, "--budget", 80, "--context", 1, "--metric", "top1_accuracy")
    assert "context: b, top-1 accuracy 0.7" in out.err


def test_budget_that_nothing_fits_is_reported(folder, compare):
    add_three(folder)
    assert "no model is known to fit 1 GB" in compare("table", folder.path, "--budget", 1, "--context", 9).err


def test_incomparable_points_are_never_the_best(folder, compare):
    add_three(folder)
    folder.add("stranger", "GGUF", "s", 2.0, 1.0, tokens="other")
    out = compare("table", folder.path, "--budget", 8, "--context", 8192, "--pareto", "--format", "json")
    assert "of context: middle" in out.err
    assert out.by_label()["stranger"]["pareto"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "8"], "--context"),
        (["--x", "memory"], "--context"),
        (["--context", "8192"], "--budget"),
        (["--budget", "0", "--context", "8192"], "--budget"),
        (["--budget", "nan", "--context", "8192"], "--budget"),
        (["--budget", "8", "--context", "-1"], "--context"),
    ],
)
def test_contradicting_flags_are_refused(folder, compare, flags, words):
    folder.add()
    out = compare("table", folder.path, *flags)
    assert out.code == 1
    assert out.err.count("\n") == 1
    assert words in out.err


def test_pareto_and_budget_refuse_a_metric_without_direction(folder, compare):
    from tests.compare.conftest import result

    content = result()
    content["results"]["wiki2_strided"] = {"speed,none": 3.0}
    content["higher_is_better"] = {}
    folder.write(content)
    assert compare("table", folder.path, "--metric", "speed").code == 0
    out = compare("table", folder.path, "--metric", "speed", "--pareto")
    assert out.code == 1
    assert "higher speed is better" in out.err


def test_pareto_greys_out_dominated_points(folder, compare, tmp_path):
    folder.add("good", "EXL3", "a", 3.0, 8.5)
    folder.add("worse", "GGUF", "b", 3.5, 9.0)
    folder.add("best", "GGUF", "c", 5.0, 8.2)
    comparison = build_comparison(read_results([folder.path]).records, Options(pareto=True))
    drawing = arrange(comparison, log_y=False)
    grey = {p.record.label for s in drawing.series for p in s.points if drawing.colour(p, s, False) == "#b4bac3"}
    assert grey == {"worse"}
    assert compare("plot", folder.path, "--pareto", "-o", tmp_path / "p.svg").code == 0
    text = (tmp_path / "p.svg").read_text()
    assert "#b4bac3" in text
    compare("plot", folder.path, "-o", tmp_path / "p.svg")
    assert "#b4bac3" not in (tmp_path / "p.svg").read_text()


# ------------------------------------------------------------------ models of different size


def sized(label: str, family: str, bpw: float, ppl: float, weights: int, **more):
    return {
        "args": (label, family, label, bpw, ppl),
        "kwargs": {"layer_parameters": weights, "weight_bytes": int(weights * bpw / 8), "file_bpw": bpw} | more,
    }


def test_models_of_different_size_are_not_joined_and_are_reported(folder, compare):
    for entry in (
        sized("a2", "GGUF", 2.0, 12.0, 7_000_000_000),
        sized("a4", "GGUF", 4.0, 9.0, 7_000_000_000),
        sized("a8", "GGUF", 8.0, 8.5, 7_100_000_000),  # within 2 %: padding
        sized("b4", "GGUF", 4.1, 6.0, 70_000_000_000),
        sized("b6", "GGUF", 6.1, 5.0, 70_000_000_000),
    ):
        folder.add(*entry["args"], **entry["kwargs"])
    comparison = build_comparison(read_results([folder.path]).records, Options())
    drawing = arrange(comparison, log_y=False)
    assert {tuple(p.record.label for p in s.points) for s in drawing.series} == {("a2", "a4", "a8"), ("b4", "b6")}
    err = compare("table", folder.path).err
    assert "models of different size" in err
    assert "about 70.00 billion weights: b4, b6" in err


def test_models_of_one_size_give_no_warning(folder, compare):
    folder.add("a", "GGUF", "a", 4.0, 9.0)
    folder.add("b", "EXL3", "b", 5.0, 9.0)
    folder.add("c", "EXL3", "c", None, 9.0)  # size unknown
    assert "different size" not in compare("table", folder.path).err


def test_each_model_size_has_its_own_baseline(folder, compare):
    for label, ppl, weights in (("7", 20.0, 7_000_000_000), ("70", 10.0, 70_000_000_000)):
        for bits, family, worse in ((16.0, "full precision", 0.0), (4.0, "GGUF", 1.0)):
            entry = sized(f"{label} {bits}", family, bits, ppl + worse, weights)
            folder.add(*entry["args"], **entry["kwargs"])
    records = compare("table", folder.path, "--format", "json").by_label()
    assert records["7 4.0"]["relative_to_reference"] == pytest.approx(0.05)
    assert records["70 4.0"]["relative_to_reference"] == pytest.approx(0.10)


def test_frontier_over_bits_per_weight_is_per_model_size(folder):
    for entry in (sized("a", "GGUF", 4.0, 9.0, 7_000_000_000), sized("b", "GGUF", 4.0, 6.0, 70_000_000_000)):
        folder.add(*entry["args"], **entry["kwargs"])
    records = read_results([folder.path]).records
    by_bits = build_comparison(records, Options(pareto=True))
    assert sorted([p.record.label for p in points] for points in by_bits.frontiers) == [["a"], ["b"]]
    by_size = build_comparison(records, Options(pareto=True, axis="size"))
    assert [[p.record.label for p in points] for points in by_size.frontiers] == [["a", "b"]]


def test_architectures_of_one_size_are_not_joined(folder, compare):
    """Two mixtures with as many weights each; a GGUF file of that size may be of either."""
    for name, ppl in (("qwen3_moe", 20.0), ("gpt_oss", 10.0)):
        for bits, family, worse in ((16.0, "full precision", 0.0), (4.0, "EXL3", 1.0)):
            folder.add(f"{name} {bits}", family, name, bits, ppl + worse, architecture=name)
    folder.add("neither", "GGUF", "Q4_K_M", 4.0, 21.0)
    shown = compare("table", folder.path, "--format", "json")
    records = shown.by_label()
    assert records["qwen3_moe 4.0"]["relative_to_reference"] == pytest.approx(0.05)
    assert records["gpt_oss 4.0"]["relative_to_reference"] == pytest.approx(0.10)
    assert records["neither"]["relative_to_reference"] is None
    assert "weights, gpt_oss: gpt_oss 16.0, gpt_oss 4.0" in shown.err


def record(
    layers: int | None, weight_bytes: int | None = None, file_bpw: float | None = None, architecture: str = ""
) -> Record:
    q = Quantization(layer_parameters=layers, weight_bytes=weight_bytes, file_bpw=file_bpw, architecture=architecture)
    return Record("m", "t", {}, q, file=Path("f"))


def test_clusters_by_decoder_weights_or_all_weights():
    assert model_clusters([record(100), record(None), record(102)]) == [0, 0, 0]
    assert model_clusters([record(100), record(103), record(103), record(None)]) == [1, 0, 0, None]
    # without the decoder's weights in each result all weights count: 1000 × 8 / 4 and 2000 × 8 / 8
    assert model_clusters([record(5, 1000, 4.0), record(None, 2000, 8.0)]) == [0, 0]
    assert model_clusters([record(5, 1000, 4.0), record(None, 2000, 4.0)]) == [0, 1]


WINDOWED = {
    "groups": [{"bytes_per_token": 20_480, "window": None}, {"bytes_per_token": 118_784, "window": 1024}],
    "state_bytes": 4096,
    "upper_bound": False,
}


def test_cache_with_windows_stops_growing_at_the_window(folder, compare):
    """20,480 × 32,768 + 118,784 × 1,024 + 4,096 bytes: 0.738 GiB, not 4.25."""
    folder.add("gemma", "NVFP4", "nvfp4", 3.0, 8.0, weight_bytes=3 * GIB, kv_bytes_per_token=None, kv_cache=WINDOWED)
    out = compare("table", folder.path, "--budget", 4, "--context", 32768, "--format", "json")
    row = out.by_label()["gemma"]
    assert row["memory_bytes"] == 3 * GIB + 32768 * 20_480 + 1024 * 118_784 + 4096
    assert row["fits"] == "fits"
    assert "no model is known to fit" in compare("table", folder.path, "--budget", 4, "--context", 60_000).err


@pytest.mark.parametrize(
    ("weights", "draft", "expected"),
    [
        (6 * GIB, 0, "fits"),  # 6 GiB and at most 1
        (7 * GIB + 1, 0, "unknown"),
        (8 * GIB + 1, 0, "too large"),  # whatever the cache takes
        (9 * GIB, 2 * GIB, "fits"),  # the draft layers are not loaded
    ],
)
def test_upper_bound_of_the_cache_shows_that_a_model_fits_but_not_that_it_does_not(
    folder, compare, weights, draft, expected
):
    bound = {"groups": [{"bytes_per_token": GIB // 8192, "window": None}], "state_bytes": 0, "upper_bound": True}
    folder.add("m", "GGUF", "m", 3.0, 8.0, weight_bytes=weights, draft_bytes=draft, kv_bytes_per_token=None,
               kv_cache=bound, notes=["kv_bytes_per_token is known as an upper bound only: a new model"])  # fmt: skip
    out = compare("table", folder.path, "--budget", 8, "--context", 8192, "--format", "json")
    row = out.by_label()["m"]
    assert (row["fits"], row["memory_bytes"]) == (expected, None)
    if expected == "fits":
        assert "+ at most 1.00 GB of KV cache" in out.err
    if expected == "unknown":
        assert "unknown whether it fits: m: kv_bytes_per_token is known as an upper bound only" in out.err


def test_draft_layers_take_no_memory():
    """GLM-4.5-Air in NVFP4 is 64.41 GiB on disk, and 57.67 GiB without its MTP layer in bfloat16."""
    facts = {"weight_bytes": 69_157_786_128, "kv_bytes_per_token": 188_416}
    assert fit(Quantization(**facts), Budget(64, 32768)) is Fit.TOO_LARGE
    assert fit(Quantization(**facts, draft_bytes=2 * 3_616_573_568), Budget(64, 32768)) is Fit.FITS


@pytest.mark.parametrize(
    "damage",
    [
        None,
        [],
        {"groups": 3},
        {"groups": [{"bytes_per_token": "many", "window": None}]},
        {"groups": [{"bytes_per_token": 5}]},
        {"groups": [{"bytes_per_token": 5, "window": -1}]},
        {"state_bytes": -1},
        {"upper_bound": None},
    ],
)
def test_damaged_size_of_the_cache_is_unknown(folder, compare, damage):
    block = WINDOWED | damage if isinstance(damage, dict) else damage
    folder.add("m", "GGUF", "m", 3.0, 8.0, weight_bytes=3 * GIB, kv_bytes_per_token=None, kv_cache=block)
    out = compare("table", folder.path, "--budget", 8, "--context", 8192, "--format", "json")
    assert out.by_label()["m"]["fits"] == "unknown"


def test_clusters_by_architecture_only_where_one_size_has_several():
    llama, mistral, unknown = (record(100, architecture=name) for name in ("llama", "mistral", ""))
    assert model_clusters([llama, llama, mistral, unknown]) == [0, 0, 1, None]
    assert model_clusters([llama, unknown, record(None)]) == [0, 0, 0]
    assert model_clusters([llama, record(200, architecture="mistral"), unknown]) == [0, 1, 0]
