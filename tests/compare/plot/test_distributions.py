"""`compare plot --spread` and `--histogram`: what is drawn from result files, and messages about what is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.plot import distributions, figure, lines, style
from compare.plot.kind import PlotSettings
from compare.plot.pictures import histogram, spread
from compare.results.reading import read_results
from tests.compare.divergence_files import LADDER, TASK, divergent, fill, write


def comparison_of(folder, **options):
    """Returns the comparison of all results in the folder by their KL divergence."""
    return build_comparison(read_results([folder.path]).records, Options(metrics=("kld",), **options))


def divergence_of(content):
    """Returns the metadata on divergence of a result file."""
    return content["configs"][TASK]["metadata"]["divergence"]


def drawn(picture, settings):
    """Returns the figure with all extents computed."""
    with figure.style_sheet(settings.theme):
        canvas = Figure(figsize=picture.size, dpi=style.DPI)
        FigureCanvasAgg(canvas)
        picture.draw(canvas, settings, pytest.fail)
        canvas.draw_without_rendering()
    return canvas


def spread_of(folder, log_y=True, dark=False, **options):
    """Returns the shown distributions and the figure of `--spread`."""
    settings = PlotSettings(dark=dark, log_y=log_y)
    picture = spread.Spread(comparison_of(folder, **options), settings)
    return picture.shown, drawn(picture, settings)


def histogram_of(folder, log_y=False):
    """Returns the shown distributions and the figure of `--histogram`."""
    settings = PlotSettings(log_y=log_y)
    picture = histogram.TokenHistogram(comparison_of(folder), settings)
    return picture.shown, drawn(picture, settings)


@pytest.mark.parametrize("kind", ["--spread", "--histogram"])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--dark", "--log-y", "--title", "$T$ <b>"],
        pytest.param(["--no-log-y"], marks=pytest.mark.slow),
    ],
)
def test_same_results_give_the_same_bytes(folder, compare, tmp_path, kind, suffix, extra):
    fill(folder, samples=False)
    for name in ("a", "b"):
        done = compare("plot", folder.path, kind, "-o", tmp_path / f"{name}.{suffix}", *extra)
        assert done.code == 0, done.err
        assert "(11 models)" in done.err
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_boxes_show_the_quantiles_of_the_file(folder):
    """Quartiles, median, whiskers and the stroke at 99 % are read back from the axes."""
    content, _ = divergent("only", bpw=4.0)
    divergence_of(content)["quantiles"] = {
        "1": 1e-5,
        "5": 1e-4,
        "25": 1e-3,
        "50": 5e-3,
        "75": 2e-2,
        "95": 0.2,
        "99": 1.5,
    }
    folder.write(content)
    _, canvas = spread_of(folder)
    ax = canvas.axes[0]
    levels = {round(float(y), 9) for line in ax.lines for y in np.atleast_1d(line.get_ydata())}
    assert {1e-4, 1e-3, 5e-3, 2e-2, 0.2, 1.5} <= levels
    assert 1e-5 not in levels
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 1e-4


def test_noise_floor_is_a_band_up_to_its_upper_quartile(folder):
    fill(folder, samples=False)
    shown, canvas = spread_of(folder)
    assert {p.record.label for p in shown.points} == {label for _, label, _, _ in LADDER}
    high = max(p.record.divergence.quantile(75) for p in shown.noise_floor)
    tops = {round(float(line.get_ydata()[0]), 12) for line in canvas.axes[0].lines if len(set(line.get_ydata())) == 1}
    assert round(high, 12) in tops
    caption = " ".join(text.get_text() for text in canvas.texts)
    assert "noise floor" in caption
    assert "BF16 in vllm, rounding and BF16 GGUF in llama.cpp" in caption


@pytest.mark.parametrize("log_y", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow), 45])
def test_boxes_and_labels_do_not_overlap(folder, count, log_y):
    """A third of the models have 4.5 bits per weight; extents are those that matplotlib draws."""
    rng = np.random.default_rng(1)
    for number in range(count):
        bpw = 4.5 if number % 3 == 0 else rng.uniform(2, 8)
        content, _ = divergent(f"model {number} g64", "GGUF", float(bpw), float(np.exp(-bpw)), scheme=f"s{number}")
        folder.write(content)
    shown, canvas = spread_of(folder, log_y)
    ax = canvas.axes[0]
    bounds = ax.get_window_extent()
    labels = [text.get_window_extent() for text in ax.texts]
    assert len(labels) == len(shown.points) == count
    assert [pair for pair in itertools.combinations(labels, 2) if pair[0].overlaps(pair[1])] == []
    assert all(bounds.x0 <= b.x0 and b.x1 <= bounds.x1 and bounds.y0 <= b.y0 and b.y1 <= bounds.y1 + 1 for b in labels)
    boxes = sorted(c.get_window_extent().x0 for c in ax.collections)
    widths = [c.get_window_extent().width for c in ax.collections]
    assert all(b - a >= max(widths) - 1 for a, b in itertools.pairwise(boxes))


def test_spread_apart_equals_constrained_least_squares():
    """The expected places come from scipy's minimization under the same constraints."""
    from scipy.optimize import minimize

    places = [10.0, 11.0, 11.5, 40.0, 80.0, 80.0, 99.0]
    moved = spread.spread_apart(places, 6.0, 0.0, 100.0)
    assert all(b - a >= 6 - 1e-9 for a, b in itertools.pairwise(moved))
    best = minimize(
        lambda x: ((x - places) ** 2).sum(), np.linspace(5, 95, 7),
        constraints=[{"type": "ineq", "fun": lambda x: np.diff(x) - 6}],
    )  # fmt: skip
    assert moved == pytest.approx(best.x.tolist(), abs=1e-3)
    assert spread.spread_apart([5.0, 1.0], 10.0, 0.0, 100.0) == [10.0, 0.0]
    assert spread.spread_apart([50.0] * 11, 20.0, 0.0, 100.0) == pytest.approx([10.0 * i for i in range(11)])
    assert spread.spread_apart([], 5.0, 0.0, 1.0) == []


@pytest.mark.slow
def test_whiskers_that_reach_below_the_axis_are_marked(folder):
    content, _ = divergent("a", bpw=4.0)
    divergence_of(content)["quantiles"] |= {"1": -1e-8, "5": 0.0, "10": 1e-9}
    folder.write(content)
    write(folder, divergent("b", bpw=5.0, seed=2)[0])
    shown, canvas = spread_of(folder)
    marked = [line for line in canvas.axes[0].lines if line.get_marker() == "v"]
    assert len(marked) == 1
    assert any("goes on below the axis" in text.get_text() for text in canvas.texts)
    assert spread.lowest(shown, True)[0] > 1e-10
    _, linear = spread_of(folder, log_y=False)
    assert not [line for line in linear.axes[0].lines if line.get_marker() == "v"]


@pytest.mark.parametrize("value", [0.0, -1e-9])
def test_model_without_divergence_is_drawn(folder, value):
    content, _ = divergent("exact", bpw=4.0)
    divergence_of(content)["quantiles"] = dict.fromkeys(("5", "25", "50", "75", "95", "99"), value)
    folder.write(content)
    for log_y in (True, False):
        shown, canvas = spread_of(folder, log_y)
        assert [point.record.label for point in shown.points] == [text.get_text() for text in canvas.axes[0].texts]


def test_lines_show_the_counts_of_the_file(folder):
    content, _ = divergent("only")
    divergence_of(content)["histogram"] = {
        "log10_edges": [-4, -3, -2, 0],
        "counts": [10, 30, 40],
        "below": 15,
        "above": 5,
    }
    folder.write(content)
    _, canvas = histogram_of(folder)
    (line,) = [line for line in canvas.axes[0].lines if len(line.get_xdata()) > 2]
    assert list(line.get_xdata()) == [-4, -4, -3, -3, -2, -2, 0, 0]
    assert list(line.get_ydata()) == pytest.approx([0, 0.1, 0.1, 0.3, 0.3, 0.2, 0.2, 0]), "share per factor of ten"
    (legend,) = canvas.legends
    assert [t.get_text() for t in legend.get_texts()] == ["only\n15 % below 10⁻⁴, 5 % above 10⁰"]
    assert canvas.axes[0].get_xlim()[0] < -4 < 0 < canvas.axes[0].get_xlim()[1]


def test_small_share_is_not_rounded_to_zero(folder):
    content, _ = divergent("only")
    divergence_of(content)["histogram"] = {"log10_edges": [-4, 0], "counts": [10**6], "below": 3, "above": 0}
    folder.write(content)
    shown = distributions.histograms(comparison_of(folder))
    assert histogram.outside(shown.points[0]) == "< 0.01 % below 10⁻⁴"
    assert histogram.power(-2.5) == "10^-2.5"


def test_lines_of_one_family_differ(folder):
    fill(folder, samples=False)
    for number in range(8):
        write(folder, divergent(f"GGUF {number}", bpw=2 + number / 8, scheme=f"s{number}", seed=number)[0])
    shown = distributions.histograms(comparison_of(folder))
    strokes = lines.strokes(shown, style.LIGHT)
    assert len({str(stroke) for stroke in strokes}) == len(LADDER) + 8


@pytest.mark.usefixtures("undrawn")
def test_results_that_cannot_be_drawn_are_named(folder, compare, tmp_path):
    write(folder, divergent("good", bpw=4.0)[0])
    write(folder, divergent("apart", bpw=4.5, reference="another")[0])
    write(folder, divergent("unsized", bpw=None)[0])
    for label, change in (
        ("broken", {"quantiles": {"50": "x"}, "histogram": {}}),
        ("poor", {"quantiles": {"50": 0.1}}),
    ):
        content, _ = divergent(label, bpw=5.0)
        divergence_of(content).update(change)
        folder.write(content)
    spread_out = compare("plot", folder.path, "--spread", "-o", tmp_path / "s.png")
    assert spread_out.code == 0
    assert {line.split(": ")[2] for line in spread_out.err.splitlines() if "not drawn" in line} == {
        "apart", "unsized", "broken", "poor",
    }  # fmt: skip
    lines_out = compare("plot", folder.path, "--histogram", "-o", tmp_path / "h.png")
    assert {line.split(": ")[2] for line in lines_out.err.splitlines() if "not drawn" in line} == {"apart", "broken"}
    assert "(3 models)" in lines_out.err, "a histogram needs no size"


@pytest.mark.usefixtures("undrawn")
def test_models_beyond_the_most_lines_are_named(folder, compare, tmp_path):
    for number in range(distributions.MOST_LINES + 2):
        write(folder, divergent(f"m{number:02}", bpw=2 + number / 5, scheme=f"s{number}", seed=number)[0])
    out = compare("plot", folder.path, "--histogram", "-o", tmp_path / "h.png")
    assert "there is room for 24 models (--mask chooses others): m24, m25" in out.err
    assert "(24 models)" in out.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spread", "--histogram", "-o", "p.png"], "not allowed with"),
        (["--spread", "-o", "p.html"], "compare report"),
        (["--histogram", "-o", "p.html"], ".png, .svg or .pdf"),
        (["--spread", "--pareto", "-o", "p.png"], "--pareto cannot be combined with it"),
        (["--spread", "--budget", "8", "--context", "5", "-o", "p.png"], "--budget cannot be combined with it"),
        (["--histogram", "--x", "vram", "-o", "p.png"], "--x cannot be combined with it"),
        (["--spread", "--mean", "-o", "p.png"], "--mean cannot be combined with it"),
        (["--spread", "--metric", "kld", "--metric", "x", "-o", "p.png"], "draws one task"),
        (["--spread", "--metric", "token_perplexity", "-o", "p.png"], "--spread shows kld only, not"),
    ],
)
def test_arguments_that_exclude_each_other_are_errors(folder, compare, arguments, message):
    fill(folder, samples=False)
    out = compare("plot", folder.path, *arguments)
    assert out.code == 1
    assert message in out.err


def test_results_without_divergence_are_an_error(folder, compare, tmp_path):
    folder.add()
    out = compare("plot", folder.path, "--spread", "-o", tmp_path / "p.png")
    assert out.code == 1
    assert "no such metric" in out.err
    content, _ = divergent("a")
    divergence_of(content)["quantiles"] = {}
    folder.write(content)
    out = compare("plot", folder.path, "--spread", "-o", tmp_path / "p.png")
    assert out.code == 2
    assert "nothing to draw" in out.err


@pytest.mark.parametrize("kind", ["--spread", "--histogram"])
def test_hostile_labels_are_drawn_as_text(folder, compare, tmp_path, kind):
    for number, label in enumerate(
        ["a\nb", "$\\frac{$", "x" * 5000, "\u202eabc", "<script>", "_hidden", "\x1b[31m", "[red] x"]
    ):
        write(folder, divergent(label, bpw=2.0 + number / 3, scheme=f"s{number}", seed=number)[0])
    out = compare("plot", folder.path, kind, "-o", tmp_path / "p.svg")
    assert out.code == 0, out.err
    assert "(8 models)" in out.err
    assert "\x1b" not in out.err
    if kind == "--histogram":
        (legend,) = histogram_of(folder)[1].legends
        assert len(legend.get_texts()) == 8
