"""A picture inside a page: matplotlib's SVG, its colours made variables of the page, with spots to point at."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from compare.comparison.comparison import Comparison
from compare.comparison.memory import GIB
from compare.comparison.point import Point
from compare.families import DOMINATED, FAMILIES
from compare.plot import style
from compare.plot.captions import alternative_text
from compare.plot.figure import render
from compare.plot.kind import PlotKind, PlotSettings, Say
from compare.plot.labels import readable
from compare.plot.pictures.scatter import Spot, render_svg
from compare.plot.series import Drawing
from compare.report.templating import trusted
from compare.table.columns import relative_text
from compare.text import metric_text

_SVG, _XLINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
_COLOUR = re.compile(r"#[0-9a-f]{6}(?![0-9a-zA-Z])")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_KEYBOARD = 200  # points; beyond, the Tab key does not stop at each


@dataclass(frozen=True)
class PageFigure:
    """A picture of a page. svg: its markup; data: JSON for page.js, what each point shows when it is pointed at."""

    svg: Markup
    data: Markup


def interactive(comparison: Comparison, drawing: Drawing, settings: PlotSettings, number: int, say: Say) -> PageFigure:
    """Scatter plot `number` of a page, with what its points show."""
    svg, spots = render_svg(comparison, drawing, settings, say)
    facts = [dict(_facts(comparison, spot.point)) for spot in spots]
    return _embed(svg, drawing, settings, number, alternative_text(comparison, drawing, limit=20), spots, facts)


def still(picture: PlotKind, drawing: Drawing, settings: PlotSettings, number: int, say: Say) -> PageFigure:
    """Picture `number` of a page, whose parts show nothing when pointed at; `drawing` has its colours."""
    return _embed(render(picture, settings, "svg", say), drawing, settings, number, picture.description, [], [])


def _embed(
    svg: bytes, drawing: Drawing, settings: PlotSettings, number: int, spoken: str, spots: list[Spot],
    facts: list[dict[str, str]],
) -> PageFigure:  # fmt: skip
    """The SVG's names get the picture's number, so that several share a page; comments and metadata are left out."""
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    colours = palette(drawing) if settings.theme is style.LIGHT else {}
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        _adapt(element, f"p{number}-", colours)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"xmlns": _SVG, "role": "group" if spots else "img", "aria-label": spoken}
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    root.append(_spots(spots, width, height))
    return PageFigure(trusted(ElementTree.tostring(root, encoding="unicode")), trusted(for_script({"points": facts})))


def for_script(data: Any) -> str:
    """JSON that may stand between script tags: ``<``, ``>`` and ``&`` as escapes, all else ASCII."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _adapt(element: ElementTree.Element, prefix: str, colours: dict[str, str]) -> None:
    """Names made unique, `xlink:href` made `href`, colours made variables."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, prefix + value)
        elif key == _XLINK:
            del element.attrib[key]
            element.set("href", f"#{prefix}{value[1:]}")
        elif "url(#" in value:
            element.set(key, _REFERENCE.sub(rf"url(#{prefix}\1)", value))
        if key in ("style", "fill", "stroke"):
            declared = element.attrib[key]
            element.set(key, _COLOUR.sub(lambda m: colour_variable(m[0]) if m[0] in colours else m[0], declared))


def colour_variable(light: str) -> str:
    """The page's variable of a colour, by its name in the light theme."""
    return f"var(--c{light[1:]})"


def palette(drawing: Drawing | None = None) -> dict[str, str]:
    """Colour on white to colour on dark: the themes', the families', and those of `drawing` made fit for text."""
    pairs = {getattr(style.LIGHT, name): getattr(style.DARK, name) for name in ("ground", "ink", "soft", "grid")}
    styles = [*FAMILIES.values(), DOMINATED]
    styles += [series.style for series in drawing.series] if drawing is not None else []
    both = [(family.light, family.dark) for family in styles]
    for light, dark in both:
        pairs.setdefault(light, dark)
    tags = [(tag, tag) for tag in _tags(drawing)]
    for light, dark in both + tags:
        pairs.setdefault(readable(light, style.LIGHT), readable(dark, style.DARK))
    return pairs


def _tags(drawing: Drawing | None) -> Iterator[str]:
    """Colours given in labels, as ``#rrggbb``: the same in both themes."""
    from matplotlib.colors import to_hex

    for colour in dict.fromkeys(drawing.colours.values()) if drawing is not None else ():
        yield str(to_hex(colour))


def _spots(spots: list[Spot], width: float, height: float) -> ElementTree.Element:
    group = ElementTree.Element("g", {"class": "spots"})
    stops = len(spots) <= _KEYBOARD
    for index, spot in enumerate(spots):
        x, y = f"{spot.x * width:.2f}", f"{spot.y * height:.2f}"
        if spot.x_end is None:
            place = {"cx": x, "cy": y, "r": f"{max(spot.radius * width + 2, 4):.2f}"}
            element = ElementTree.SubElement(group, "circle", place)
        else:
            place = {"x1": x, "y1": y, "x2": f"{spot.x_end * width:.2f}", "y2": y}
            element = ElementTree.Element("line", place)
            group.insert(0, element)  # below the points
        element.attrib |= {"data-i": str(index), "class": "spot"}
        if stops:
            element.attrib |= {"tabindex": "0", "role": "img", "aria-label": _sentence(spot.point)}
        # Browsers without scripts show this on hover.
        ElementTree.SubElement(element, "title").text = _sentence(spot.point)
    return group


def _sentence(point: Point) -> str:
    return f"{point.record.label}: {metric_text(point.y, point.stderr)}"


def _facts(comparison: Comparison, point: Point) -> Iterator[tuple[str, str]]:
    """Yields what a point shows on hover: names and texts, in order; the name ``""`` is the heading."""
    q, record = point.record.quantization, point.record
    yield "", record.label
    yield comparison.metric.name, metric_text(point.y, point.stderr)
    if change := relative_text(comparison, point):
        yield "vs. reference", change
    yield "Family", " ".join(filter(None, (q.family, q.scheme)))
    figures = (("Bits per weight", q.layer_bpw, ".3f", ""), ("Head", q.head_bpw, ".2f", " bits per weight"),
               ("VRAM", q.vram_gb, ".3f", " GB (decoder and head)"))  # fmt: skip
    for name, value, digits, unit in figures:
        if value is not None:
            yield name, f"{value:{digits}}{unit}"
    if q.weight_bytes is not None:
        yield "All weights", f"{q.weight_bytes / GIB:.3f} GB"
    if comparison.verdict is not None:
        yield from _memory(comparison, point)
    yield "Engine", " ".join(filter(None, (q.engine, q.engine_version, q.kernel or "")))
    if not point.comparable:
        yield "Not comparable", record.protocol.describe() or "other tokens"
    if q.runs_other_than_named:
        yield "Note", "quantized activations by its checkpoint, run weight-only"
    for caveat in q.caveats:
        yield "Note", caveat


def _memory(comparison: Comparison, point: Point) -> Iterator[tuple[str, str]]:
    from compare.comparison.memory import fit, memory_bytes

    verdict = comparison.verdict
    assert verdict is not None
    needed = memory_bytes(point.record.quantization, verdict.budget.context)
    fits = fit(point.record.quantization, verdict.budget).value
    size = "" if needed is None else f"{needed / GIB:.3f} GB, "
    yield f"With {verdict.budget.context:,} tokens", f"{size}{fits}{', best' * (point is verdict.best)}"
