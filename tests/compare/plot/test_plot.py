"""`compare plot`: which points are drawn and joined, labels that do not overlap, equal files for equal results."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.families import FAMILIES
from compare.plot.series import arrange
from compare.results.reading import read_results
from tests.compare.conftest import fill_with_ladders


def drawing_of(folder, log_y=False, **options):
    """Returns the comparison of all results in the folder and how it is drawn."""
    comparison = build_comparison(read_results([folder.path]).records, Options(**options))
    return comparison, arrange(comparison, log_y)


def joined(drawing):
    """Returns the labels of each series that is drawn as a line, in drawing order."""
    return {tuple(p.record.label for p in s.points) for s in drawing.series if s.joined}


def test_points_of_a_family_are_joined_in_order_of_x(folder):
    for label, bpw, ppl in (("c", 6.0, 8.0), ("a", 2.0, 12.0), ("b", 4.0, 9.0)):
        folder.add(label, "GGUF", label, bpw, ppl)
    folder.add("e", "EXL3", "e", 3.0, 9.0)
    _, drawing = drawing_of(folder)
    assert joined(drawing) == {("a", "b", "c")}


def test_points_of_other_tokens_or_arithmetic_are_not_joined(folder):
    folder.add("a16", "NVFP4", "nvfp4a16", 4.5, 8.6)
    folder.add("w4a4", "NVFP4", "nvfp4", 4.51, 9.0, kernel="EmulationNvFp4LinearKernel")
    folder.add("marlin", "NVFP4", "nvfp4", 4.51, 8.6, kernel="MarlinNvFp4LinearKernel")
    folder.add("g1", "GGUF", "g1", 4.0, 8.6)
    folder.add("g2", "GGUF", "g2", 5.0, 8.6, tokens="other")
    folder.add("g3", "GGUF", "g3", 6.0, 8.6, tokens="other")
    _, drawing = drawing_of(folder)
    assert joined(drawing) == {("a16", "marlin")}
    _, mixed = drawing_of(folder, allow_mixed=True)
    assert joined(mixed) == {("a16", "marlin"), ("g1", "g2", "g3")}


@pytest.mark.usefixtures("undrawn")
def test_full_precision_is_a_line_and_unknown_sizes_are_not_drawn(folder, compare, tmp_path):
    from tests.compare.conftest import result

    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.17)
    folder.add("Q4", "GGUF", "Q4", 4.5, 8.5)
    for label, dtype in (("stock-full", "float32"), ("stock-unknown", "auto")):
        content = result(label, ppl=8.2, quantized=False)
        content["config"]["model_args"]["dtype"] = dtype
        content["config"]["model"] = "hf"
        folder.write(content)
    _, drawing = drawing_of(folder)
    assert {p.record.label for p in drawing.references} == {"BF16"}
    assert [p.record.label for p in drawing.points] == ["Q4"]
    out = compare("plot", folder.path, "-o", tmp_path / "p.png")
    assert out.code == 0
    assert "not drawn: hf stock-unknown" in out.err
    assert "not drawn: hf stock-full" in out.err


def test_stock_model_alone_is_drawn_as_the_baseline_that_the_user_names(folder, compare, tmp_path):
    from tests.compare.conftest import result

    content = result("base", ppl=8.2, quantized=False)
    content["config"]["model_args"]["dtype"] = "float32"
    folder.write(content)
    assert compare("plot", folder.path, "-o", tmp_path / "p.png").code == 2
    assert compare("plot", folder.path, "-o", tmp_path / "p.png", "--baseline", "base").code == 0


@pytest.mark.usefixtures("undrawn")
def test_null_perplexity_is_not_drawn_but_named(folder, compare, tmp_path):
    folder.add("bad", ppl=None)
    assert compare("plot", folder.path, "-o", tmp_path / "p.png").code == 2
    folder.add("good", scheme="other")
    out = compare("plot", folder.path, "-o", tmp_path / "p.png")
    assert out.code == 0
    assert "not drawn: bad" in out.err


def test_colour_tags_in_labels_set_colours(folder, compare, tmp_path):
    folder.add("one [#ff8800]", "GGUF", "a", 3.0, 9.0)
    folder.add("[teal] two", "GGUF", "b", 4.0, 8.5)
    folder.add("three [blurple]", "GGUF", "c", 5.0, 8.3)
    _, drawing = drawing_of(folder)
    (series,) = drawing.series
    assert [drawing.colour(p, series, dark=False) for p in series.points] == ["#ff8800", "teal", FAMILIES["GGUF"].light]
    out = compare("plot", folder.path, "-o", tmp_path / "p.svg")
    assert "unknown colour [blurple]" in out.err
    text = (tmp_path / "p.svg").read_text()
    assert "#ff8800" in text
    assert "[" not in text.split("<dc:description>")[1].split("</dc:description>")[0]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("extra", [pytest.param([], marks=pytest.mark.slow), ["--dark", "--log-y", "--x", "vram"]])
def test_same_results_give_the_same_bytes(folder, compare, tmp_path, suffix, extra):
    fill_with_ladders(folder, per_family=3)
    for name in ("a", "b"):
        assert compare("plot", folder.path, "-o", tmp_path / f"{name}.{suffix}", "--title", "T", *extra).code == 0
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_png_has_2000_by_1280_pixels(folder, compare, tmp_path):
    folder.add()
    compare("plot", folder.path, "-o", tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (2000, 1280)


HOSTILE = ["a\nb", "$\\frac{$", "$x^2$", "x" * 5000, "\u202eabc", "שלום עולם", "🙂" * 9, "<script>alert(1)</script>",
           "\x1b[31mred", "[bold]x[/bold]", "\x00", "\ud800", "%s {0} \\", "-->", "]]>", "&amp;"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_hostile_labels_are_drawn_as_text(folder, compare, tmp_path, suffix):
    for number, label in enumerate(HOSTILE):
        folder.add(label, "GGUF", f"s{number}", 2.0 + number / 3, 12 - number / 3)
    folder.add("$ref$ <b>", "full precision", "bfloat16", 16.0, 6.0)
    target = tmp_path / f"p.{suffix}"
    out = compare("plot", folder.path, "-o", target, "--title", "$T$ <script> \x1b")
    assert out.code == 0, out.err
    assert "\x1b" not in out.err
    if suffix == "svg":
        import xml.etree.ElementTree as ElementTree

        root = ElementTree.fromstring(target.read_bytes())
        assert not [element for element in root.iter() if element.tag.endswith("script")]


@pytest.mark.parametrize("count", [3, pytest.param(15, marks=pytest.mark.slow), 25])
@pytest.mark.parametrize("options", [{}, {"pareto": True, "axis": "memory", "budget": 5.0, "context": 8192}])
def test_labels_overlap_neither_each_other_nor_points(folder, count, options):
    """No two labels overlap, no label covers a marker, and no leader line crosses the marker of another point.

    Extents are those that matplotlib draws. A marker has a diameter of 8.5 points, 24 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from compare.plot import figure as pictures
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures import scatter

    rng = np.random.default_rng(1)
    families = list(FAMILIES)[:8]
    for number in range(count):
        bpw = rng.uniform(2, 8)
        folder.add(f"model {number} g{64 << number % 3}", families[number % 8], f"s{number}", bpw,
                   8 + 9 * np.exp(1.7 - bpw) * rng.uniform(0.8, 1.2), 0.1)  # fmt: skip
    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.0, 0.1)
    comparison, drawing = drawing_of(folder, **options)
    settings = PlotSettings()
    with pictures.style_sheet(settings.theme):
        picture = Figure(figsize=(10, 6.4), dpi=200)
        FigureCanvasAgg(picture)
        scatter.Scatter(comparison, drawing, settings).draw(picture, settings, pytest.fail)
        ax = picture.axes[0]
        boxes = {t.get_text(): t.get_window_extent() for t in ax.texts}
        bounds = ax.get_window_extent()
        leaders = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_zorder() == 2.5]
    assert len(boxes) == count + (2 if options else 1)
    overlapping = [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert overlapping == []
    centres = ax.transData.transform([(p.x, p.y) for p in drawing.points])
    touching = [(name, tuple(c)) for name, box in boxes.items() for c in centres if distance(box, c) < 10]
    assert touching == []
    crossed = [(i, tuple(c)) for i, (a, b) in enumerate(leaders) for c in centres if through(a, b, c, radius=8.0)]
    assert crossed == []
    inside = {n for n, b in boxes.items() if bounds.x0 <= b.x0 and b.x1 <= bounds.x1 and bounds.y0 <= b.y0 <= b.y1}
    inside -= {name for name, box in boxes.items() if box.y1 > bounds.y1}
    assert inside == set(boxes)


def test_leader_across_another_point_costs_more():
    """Two places have the same distance from the label's point, but another point is on the way to one of them."""
    from compare.plot.label_places import Obstacles, _Layout

    anchor, size, bounds = np.array([[500.0, 500.0]]), np.array([[40.0, 20.0]]), (0.0, 0.0, 1000.0, 1000.0)
    in_the_way = np.array([[500.0, 500.0], [560.0, 560.0]])
    layout = _Layout(anchor.copy(), size, anchor, Obstacles(in_the_way, 18.0), bounds)
    behind, aside = layout._covering_costs(0, np.array([[640.0, 630.0], [360.0, 630.0]]))
    assert behind - aside > 300


def distance(box, point):
    """Returns the distance in pixels of a point from a box, 0 inside."""
    return np.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))


def through(a, b, centre, radius):
    """Returns whether the segment from a to b, in pixels, passes within `radius` of a centre other than its start."""
    along = np.clip(np.dot(centre - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0, 1)
    return np.linalg.norm(a + along * (b - a) - centre) < radius and np.linalg.norm(a - centre) > 20


def test_points_without_room_for_a_label_are_counted_in_a_message(folder, compare, tmp_path):
    for number in range(65):
        folder.add(f"m{number}", "GGUF", f"s{number}", 2 + number / 20, 12 - number / 30)
    out = compare("plot", folder.path, "-o", tmp_path / "p.png")
    assert out.code == 0
    assert "without a label" in out.err


def test_missing_display_is_an_error_in_one_line(folder, compare, monkeypatch):
    folder.add()
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    out = compare("plot", folder.path)
    assert out.code == 1
    assert out.err.count("\n") == 1
    assert "-o plot.png" in out.err


@pytest.mark.parametrize("target", ["p.jpg", "p", "absent/p.png"])
def test_output_that_cannot_be_written_is_an_error(folder, compare, tmp_path, target):
    folder.add()
    out = compare("plot", folder.path, "-o", tmp_path / target)
    assert out.code == 1
    assert "Traceback" not in out.err
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


# Matrices of Machado, Oliveira, Fernandes 2009 for severity 1.0, on linear RGB
COLOUR_BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(colour: str, matrix: list[list[float]]) -> np.ndarray:
    """Returns CIE L*a*b* (D65) of a colour after multiplying its linear RGB by `matrix`."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


COLOURED = (
    "EXL2", "EXL3", "GGUF", "VPTQ", "QTIP", "NVFP4", "AWQ", "GPTQ", "bitsandbytes", "AQLM", "Any-Precision", "HQQ",
)  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", list(COLOUR_BLINDNESS))
def test_colours_of_families_differ_for_colour_blind_readers(kind, theme):
    seen = {n: lab(getattr(FAMILIES[n], theme), COLOUR_BLINDNESS[kind]) for n in COLOURED}
    distances = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in itertools.combinations(seen, 2)}
    assert min(distances.values()) > 12, min(distances, key=distances.get)


def test_every_family_has_its_own_marker():
    markers = [family.marker for family in FAMILIES.values()]
    assert len(set(markers)) == len(markers)
