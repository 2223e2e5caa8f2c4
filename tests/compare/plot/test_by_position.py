"""Figures by position in the window: `--by-position` of `compare plot` and `compare table`, the report's section."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.plot import figure, style
from compare.plot.kind import PlotSettings
from compare.plot.pictures.by_position import ByPosition
from compare.results.positions import read_positions
from compare.results.reading import read_results
from lmeval_ext.positions import WindowCurve, describe
from tests.compare.conftest import result
from tests.compare.divergence_files import TASK, by_position, divergent

EDGES = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


def add(folder, label, *, positions=None, tokens="main", reference="reference", **curve):
    """Writes a model's result with figures by position."""
    content, _ = divergent(label, tokens=tokens, reference=reference, scheme=label)
    content["configs"][TASK]["metadata"]["by_position"] = by_position(**curve) if positions is None else positions
    return folder.write(content)


def comparison_of(folder, metric="kld"):
    return build_comparison(read_results([folder.path]).records, Options(metrics=(metric,)))


def drawn(folder, metric="kld", **settings):
    """Returns the picture and the figure with all extents computed."""
    look = PlotSettings(**settings)
    picture = ByPosition(comparison_of(folder, metric), look)
    with figure.style_sheet(look.theme):
        canvas = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(canvas)
        picture.draw(canvas, look, pytest.fail)
        canvas.draw_without_rendering()
    return picture, canvas


def test_bins_of_a_file_are_read_and_named():
    found = read_positions({"by_position": by_position()})
    assert list(found.edges) == EDGES
    assert found.bin_names()[:2] == ["1–15", "16–31"]
    assert found.bin_names()[-1] == "16384–32767"
    assert found.curves["kld"].values[3] == pytest.approx(0.023)
    assert found.curves["kld"].slope_error == pytest.approx(0.000125)


@pytest.mark.parametrize(
    "change",
    [
        {"edges": "none"},
        {"edges": [1]},
        {"edges": [1, 16, 16, *EDGES[3:]]},
        {"edges": [0, *EDGES[1:]]},
        {"edges": [1.5, *EDGES[1:]]},
        {"tokens": [3]},
        {"tokens": [None] * 12},
        {"blocks": -1},
        {"blocks": None},
        {"metrics": {"kld": {"values": [1.0], "stderr": [1.0]}}},
        {"metrics": [1]},
    ],
)
def test_unsound_bins_are_left_out(change):
    assert read_positions({"by_position": by_position() | change}) is None


def test_unsound_values_are_left_out():
    block = by_position()
    block["metrics"]["kld"] |= {"values": [float("nan"), "x", *[0.1] * 10], "slope": float("inf"), "slope_stderr": -1}
    curve = read_positions({"by_position": block}).curves["kld"]
    assert curve.values[:3] == (None, None, 0.1)
    assert curve.slope is curve.slope_error is None
    assert read_positions({}) is None


def test_lines_and_bars_are_those_of_the_file(folder):
    add(folder, "one", slope=0.003, level=0.02, error=0.001)
    _, canvas = drawn(folder, log_y=False)
    ax = canvas.axes[0]
    line = next(line for line in ax.lines if len(line.get_xdata()) == 12)
    np.testing.assert_allclose(line.get_ydata(), [0.02 + 0.003 * i for i in range(12)])
    np.testing.assert_allclose(line.get_xdata(), [(a * (b - 1)) ** 0.5 for a, b in itertools.pairwise(EDGES)])
    half = stats.t.ppf(0.975, 8) * 0.001
    bars = [bar.get_ydata() for bar in ax.lines if len(bar.get_xdata()) == 2]
    np.testing.assert_allclose([b[1] - b[0] for b in bars], [2 * half] * 12)
    names = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert names == ["one\n+0.00300 ± 0.00058 nats per doubling"]


def test_models_on_other_tokens_or_from_another_reference_are_left_out(folder):
    add(folder, "one")
    add(folder, "two")
    add(folder, "other tokens", tokens="others")
    add(folder, "other reference", reference="another")
    picture, _ = drawn(folder)
    assert [p.record.label for p in picture.shown.points] == ["one", "two"]
    assert sum("other tokens or another reference" in line for line in picture.shown.left_out) == 2


def test_perplexity_by_position_does_not_depend_on_the_reference(folder):
    add(folder, "one")
    add(folder, "two", reference="another")
    picture, canvas = drawn(folder, "token_perplexity")
    assert [p.record.label for p in picture.shown.points] == ["one", "two"]
    assert canvas.axes[0].get_yscale() == "linear"
    assert picture.title == "Perplexity by position in the window"


def test_few_blocks_give_no_bars_and_the_caption_says_so(folder):
    add(folder, "one", windows=2, longest=131072)
    _, canvas = drawn(folder)
    assert not [bar for bar in canvas.axes[0].lines if len(bar.get_xdata()) == 2]
    caption = " ".join(text.get_text() for text in canvas.texts)
    assert "No intervals: 2 independent blocks of windows, fewer than 5." in caption


def test_values_at_or_below_zero_are_gaps_on_a_logarithmic_axis(folder):
    positions = by_position()
    positions["metrics"]["kld"]["values"][2:4] = [0.0, -1e-7]
    add(folder, "one", positions=positions)
    _, canvas = drawn(folder)
    line = next(line for line in canvas.axes[0].lines if len(line.get_xdata()) == 12)
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [2, 3]


@pytest.mark.usefixtures("undrawn")
def test_plot_command_draws_the_metric_that_is_named(folder, compare, tmp_path):
    add(folder, "one")
    folder.write(divergent("old", scheme="old")[0])
    for metric in (), ("--metric", "ppl_ratio"):
        done = compare("plot", folder.path, "--by-position", *metric, "-o", tmp_path / "p.svg")
        assert done.code == 0, done.err
        assert "(1 models)" in done.err
        assert "not drawn: old: its result file holds no" in done.err
    done = compare("plot", folder.path, "--by-position", "--x", "vram", "-o", tmp_path / "p.svg")
    assert done.code == 1
    assert "--by-position shows distributions; --x cannot be combined with it" in done.err


def test_plot_without_a_reference_draws_the_perplexity(folder, compare, tmp_path):
    content = result("plain")
    content["configs"][TASK]["metadata"]["by_position"] = by_position()
    folder.write(content)
    done = compare("plot", folder.path, "--by-position", "-o", tmp_path / "p.svg")
    assert done.code == 0, done.err
    assert "Perplexity by position in the window" in (tmp_path / "p.svg").read_text(encoding="utf-8")
    done = compare("plot", folder.path, "--spread", "-o", tmp_path / "p.svg")
    assert done.code == 1
    assert "--metric kld: no such metric" in done.err


def test_table_shows_slopes_with_intervals_and_the_outer_bins(folder, compare):
    add(folder, "steep", slope=0.003)
    add(folder, "flat", slope=0.0)
    folder.write(divergent("old", scheme="old")[0])
    done = compare("table", folder.path, "--metric", "kld", "--by-position", "--format", "md")
    assert done.code == 0, done.err
    heading, _, *rows = [line for line in done.out.splitlines() if line.startswith("|")]
    names = [name.strip() for name in heading.strip("|").split("|")]
    assert {"At 1–15", "At 16384–32767", "Slope (nats per doubling)", "95 % interval of the slope"} <= set(names)
    cells = {
        r[0]: dict(zip(names, r, strict=True)) for r in ([c.strip() for c in row.strip("|").split("|")] for row in rows)
    }
    half = stats.t.ppf(0.975, 8) * 0.0005 / 4
    assert cells["steep"]["At 16384–32767"] == "0.053"
    assert cells["steep"]["95 % interval of the slope"] == f"{0.003 - half:+.5f} to {0.003 + half:+.5f}"
    assert cells["old"]["Slope (nats per doubling)"] == ""
    assert "t over 9 blocks of windows" in done.out


def test_json_has_every_bin_on_request_alone(folder, compare):
    add(folder, "one", slope=0.003)
    asked = json.loads(compare("table", folder.path, "--metric", "kld", "--by-position", "--format", "json").out)[0]
    plain = json.loads(compare("table", folder.path, "--metric", "kld", "--format", "json").out)[0]
    assert asked["at_16384_32767"] == pytest.approx(0.053)
    assert asked["slope_low"] < asked["slope"] == 0.003 < asked["slope_high"]
    assert (asked["slope_unit"], asked["position_blocks"]) == ("nats per doubling", 9)
    assert not {name for name in plain if name.startswith(("at_", "slope"))}


def test_table_without_any_figures_by_position_is_an_error(folder, compare):
    folder.write(divergent("old")[0])
    done = compare("table", folder.path, "--metric", "kld", "--by-position")
    assert done.code == 2
    assert "no result file holds wiki2_strided/kld by position" in done.err
    done = compare("table", folder.path, "--metric", "kld", "--mean", "--by-position")
    assert done.code == 1


WINDOWS, TOKENS = 9, 4095


def simulated(growth, seed):
    """``metadata.by_position`` and divergences [windows, tokens] of a model that loses `growth` more per doubling.

    The text makes some tokens hard for every model, so that models differ by far less than windows do.
    """
    hard = np.random.default_rng(1).lognormal(-4.5, 1, (WINDOWS, TOKENS)) * np.linspace(0.6, 1.5, WINDOWS)[:, None]
    x = np.log2(np.arange(1, TOKENS + 1))
    kld = hard * np.exp(np.random.default_rng(seed).normal(0, 0.3, hard.shape)) * (1 + growth * x)
    return describe([WindowCurve.of(i, 1, {"kld": row}) for i, row in enumerate(kld)], 1), kld


def test_pairs_separate_late_positions_where_intervals_of_each_model_overlap(folder, compare):
    """The two models are alike at early positions; at late ones their own intervals overlap, and those of pairs do not
    contain zero."""
    models = {"f16": simulated(0.0, 2), "q8_0": simulated(0.006, 3)}
    for label, (positions, _) in models.items():
        add(folder, label, positions=positions)
    done = compare("table", folder.path, "--metric", "kld", "--by-position", "--versus", "f16", "--format", "json")
    assert done.code == 0, done.err
    assert "does not exist: run that evaluation with --log_samples" in done.err  # the means of the windows have no pair
    rows = {row["label"]: row for row in json.loads(done.out)}
    row = rows["q8_0"]
    assert row["difference_at_1_15_low"] < 0 < row["difference_at_1_15_high"]
    assert row["difference_at_2048_4095_low"] > 0
    assert row["at_2048_4095"] - row["at_2048_4095_half_width"] < rows["f16"]["at_2048_4095"]
    x = np.tile(np.log2(np.arange(1, TOKENS + 1)), WINDOWS)
    slopes = {label: np.polyfit(x, kld.ravel(), 1)[0] for label, (_, kld) in models.items()}
    assert row["difference_slope"] == pytest.approx(slopes["q8_0"] - slopes["f16"], rel=1e-6)
    late = {label: kld[:, 2047:] for label, (_, kld) in models.items()}
    assert row["difference_at_2048_4095"] == pytest.approx(late["q8_0"].mean() - late["f16"].mean(), rel=1e-9)
    # For windows of equal length, the error of the mean's difference is that of the windows' differences
    by_window = (late["q8_0"] - late["f16"]).mean(axis=1)
    half = stats.t.ppf(0.975, WINDOWS - 1) * by_window.std(ddof=1) / WINDOWS**0.5
    assert (row["difference_at_2048_4095_high"] - row["difference_at_2048_4095_low"]) / 2 == pytest.approx(
        half, rel=0.05
    )
    table = compare("table", folder.path, "--metric", "kld", "--by-position", "--versus", "f16", "--format", "md").out
    assert "Δ to f16 at 2048–4095" in table
    assert table.count("≈") == 2  # the first bin, and the note that explains it


def test_models_are_paired_on_the_same_windows_alone(folder, compare):
    positions, _ = simulated(0.0, 2)
    add(folder, "base", positions=positions)
    add(folder, "other tokens", positions=positions, tokens="others")
    add(folder, "other reference", positions=positions, reference="another")
    add(folder, "no sums", positions={k: v for k, v in positions.items() if k != "block_x"})
    add(folder, "other bins", positions=simulated(0.0, 2)[0] | {"block_tokens": [[1] * 9] * 9})
    more = ("--by-position", "--versus", "base", "--format", "json", "--allow-mixed")
    done = compare("table", folder.path, "--metric", "kld", *more)
    assert done.code == 2  # nothing can be paired, by position or by samples
    add(folder, "same", positions=positions)
    rows = json.loads(compare("table", folder.path, "--metric", "kld", *more).out)
    assert {row["label"] for row in rows if row["difference_slope"] is not None} == {"same"}
    assert next(row for row in rows if row["label"] == "same")["difference_slope"] == 0


@pytest.mark.usefixtures("undrawn")
def test_report_has_a_section_where_the_data_exist(folder, compare, tmp_path):
    add(folder, "one", slope=0.003)
    page = tmp_path / "r.html"
    assert compare("report", folder.path, "-o", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert 'id="position"' in text
    assert "By position in the window" in text
    assert "wiki2_strided/kld by position" in text
    assert "wiki2_strided/token_perplexity by position" in text
    assert "+0.00300 ± 0.00029" in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_report_of_older_results_has_no_such_section(folder, compare, tmp_path):
    folder.write(divergent("old")[0])
    page = tmp_path / "r.html"
    assert compare("report", folder.path, "-o", page).code == 0
    assert 'id="position"' not in page.read_text(encoding="utf-8")
