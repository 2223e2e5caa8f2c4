"""`compare report` and the interactive plot: what the page contains, and how it behaves in a browser."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compare.cli import main
from compare.families import FAMILIES
from compare.report.family_notes import FAMILY_NOTES
from compare.results.provenance import Run, command
from tests.compare.browser import Browser, chromium, find_browser, served
from tests.compare.conftest import Folder, fill_with_ladders, result
from tests.compare.divergence_files import LADDER, TASK, divergent, fill

# Each sets the page's title to "pwned" if it runs
PAYLOAD = "document.title='pwned'"
HOSTILE = [
    f"<script>{PAYLOAD}</script>",
    f"</script><script>{PAYLOAD}</script>",
    f"</style><script>{PAYLOAD}</script>",
    f"</title><svg onload={PAYLOAD}>",
    f'"><img src=x onerror="{PAYLOAD}">',
    f"'><img src=x onerror='{PAYLOAD}'>",
    f'<a href="javascript:{PAYLOAD}">click</a>',
    f"javascript:{PAYLOAD}",
    "<img src=https://example.invalid/track.png>",
    "<style>@import url(https://example.invalid/a.css)</style>",
    f"--><script>{PAYLOAD}</script><!--",
    f"]]><script>{PAYLOAD}</script>",
    "<!--",
    "</figure></main></body>",
    "&lt;b&gt; &amp; \u2028 \u202e evil \x00 \x1b[31m",
    "{{7*7}} ${7*7} %s",
]


class Page(HTMLParser):
    """Holds the tags, attributes and texts of a page, parsed by the HTML standard's rules for scripts."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._inside = [""]
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self._inside[-1], data))

    @property
    def scripts(self) -> list[str]:
        return [text for inside, text in self.texts if inside == "script"]


def add_hostile(folder, with_reference: bool = False) -> None:
    """Writes results with hostile text in every field that a page shows; optionally in those about a reference, too."""
    for number, label in enumerate(HOSTILE):
        settings = {"kernel": label, "notes": [label], "engine": label, "device": label}
        content = result(label, "GGUF", label, 2.0 + number / 4, 12.0 - number / 4, **settings)
        if with_reference:
            measured, _ = divergent(seed=number)
            block = measured["configs"][TASK]["metadata"]["divergence"]
            block["reference"] |= {"label": label, "engine": label, "dtype": label}
            block["rounding"] = {"kld": 1e-6, "engine": label}
            content["configs"][TASK]["metadata"]["divergence"] = block
            content["results"][TASK] = measured["results"][TASK] | content["results"][TASK]
        content["config"]["model_args"] = {"pretrained": label, "x": [label]}
        content["config"]["model"] = label
        content["configs"]["wiki2_strided"]["metadata"]["text"] = label
        content["configs"]["wiki2_strided"]["metadata"]["text_sha256"] = label
        folder.write(content)
    folder.add("full <script>", "full precision", "bfloat16", 16.0, 6.0)
    folder.add("<b>odd family</b>", '"><script>x</script>', "s", 3.3, 9.0)
    folder.add("apart <script>", "GGUF", "s", 3.4, 9.0, tokens="other")


def page_of(folder, *arguments: str) -> str:
    """Returns the page that `compare ARGUMENTS` writes on the results in the folder."""
    out = folder.path.parent / "page.html"
    command, *flags = arguments
    assert main([command, str(folder.path), "-o", str(out), *flags]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns a function from a command, `report` or `plot`, to its page on hostile results; each is drawn once."""

    @functools.cache
    def page(command: str) -> str:
        folder = Folder(tmp_path_factory.mktemp(command))
        add_hostile(folder, with_reference=command == "report")
        return page_of(folder, command, "--metric", "token_perplexity")

    return page


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report on five families with every choice: a coloured label, a model apart, a frontier and a budget."""
    folder = Folder(tmp_path_factory.mktemp("full"))
    fill_with_ladders(folder, per_family=3)
    folder.add("tagged [#12ab34]", "GGUF", "t", 4.4, 9.1)
    folder.add("apart", "GGUF", "u", 4.4, 9.1, tokens="other")
    return page_of(folder, "report", "--budget", "6", "--context", "8192", "--pareto")


@pytest.fixture
def report(folder, compare, tmp_path):
    """Returns a function that writes a report on the results in `folder`, and returns its bytes."""

    def make(*flags: object, command: str = "report") -> bytes:
        out = compare(command, folder.path, "-o", tmp_path / "page.html", *flags)
        assert out.code == 0, out.err
        return (tmp_path / "page.html").read_bytes()

    return make


def test_report_has_every_model_and_every_part(full_report):
    page = Page(full_report)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3, "memory, bits per weight, VRAM"
    assert sum(tag == "tr" for tag, _ in page.tags) == 2 + 17, "a table of 16 models, and one apart"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"plots", "table", "settings", "families", "reproduce"} <= set(ids)
    for words in ("Best within 6 GB", FAMILY_NOTES["VPTQ"], "20 windows", "lm_eval run"):
        assert words in unescape(full_report)
    targets = {a["href"][1:] for tag, a in page.tags if tag in ("a", "use") and a.get("href", "").startswith("#")}
    assert targets <= set(ids)


@pytest.mark.parametrize("command", ["report", "plot"])
def test_page_fetches_nothing_and_allows_one_script(hostile_page, command):
    page = Page(hostile_page(command))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "base-uri 'none'; form-action 'none'" in policy
    kinds = [a.get("type") for tag, a in page.tags if tag == "script"]
    assert kinds.count(None) == 1, "one script of ours; the others are data"
    assert set(kinds) <= {None, "application/json"}
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "foreignobject")
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src") is None
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))


@pytest.mark.parametrize("command", ["report", "plot"])
def test_hostile_labels_stay_text(hostile_page, command):
    from compare.text import clean

    page = Page(hostile_page(command))
    texts = {inside: {text for where, text in page.texts if where == inside} for inside in ("", "script")}
    data = [json.loads(text) for text in page.scripts if text.startswith('{"points"')]
    labels = {point[""] for block in data for point in block["points"]}
    for label in HOSTILE:
        assert clean(label) in labels
        assert command == "plot" or clean(label) in texts[""]
    assert not [text for text in page.scripts if PAYLOAD in text and not text.startswith('{"points"')]


def test_hostile_report_has_its_section_on_divergence(hostile_page):
    """Without it, the tests of that page would not look at the section's texts."""
    assert section_of(hostile_page("report"), "divergence").count("<svg") == 3


HOSTILE_TEXTS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>']


def rendered(template: str, **values: object) -> str:
    """Returns a page of the template, with the values and an empty frame."""
    from compare.report.templating import render

    frame = {"policy": "", "title": "", "style": "", "script": "", "dark": False}
    return render(template, frame | values)


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_plot_template_escapes_every_text(text):
    from compare.report.pictures import PageFigure

    page = rendered("plot", **dict.fromkeys(("policy", "title", "heading", "style", "script"), text),
                    pictures=[PageFigure(text, text)])  # fmt: skip
    assert text not in page
    assert Page(page).texts
    assert not [tag for tag, _ in Page(page).tags if tag == "img"]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_report_template_escapes_every_text(text):
    """Every value is hostile: the parts, tables, verdict, settings, runs and the section on divergence."""
    from compare.report import answers, build, content, divergence, domains
    from compare.report.pictures import PageFigure

    table = content.PageTable(
        text, [content.Head(text)], [content.PageRow(text, text, [content.Cell(text), content.Cell(text, text)])],
        [text],
    )  # fmt: skip
    picture = PageFigure(text, text)
    names = (
        "answer", "plots", "table", "divergence", "answers", "domains", "settings", "families", "reproduce", "left-out",
    )  # fmt: skip
    run = content.RunEntry(text, text, text, [text], runs_foreign_code=True, shown_inexactly=True)
    page = rendered(
        "report", title=text, about=text, parts=[build.Part(name, text) for name in names],
        verdicts=[content.VerdictText(text, [text])], answer=[text], pictures=[], tables=[table],
        by_domain=domains.DomainSection(table, [text]),
        divergences=[divergence.DivergenceSection(text, tables=[table], by_confidence=[table])],
        meaning=[(text, text)], answers=[answers.AnswerSection(picture, [table])], answers_meaning=[(text, text)],
        settings=[content.SettingsList(text, [(text, text)])], families=[(text, text)],
        runs=[run], notices=[text],
    )  # fmt: skip
    assert text not in page
    assert sum(text in part for _, part in Page(page).texts) >= 55
    assert not [tag for tag, _ in Page(page).tags if tag == "img"]


def test_every_template_belongs_to_a_tested_page():
    folder = Path(__file__).parents[3] / "compare" / "report" / "templates"
    assert {file.name for file in folder.iterdir()} == {
        "page.html.j2", "parts.html.j2", "plot.html.j2", "report.html.j2",
    }  # fmt: skip


@pytest.mark.slow
def test_same_results_give_the_same_page(folder, report):
    fill_with_ladders(folder, per_family=2)
    assert report("--pareto") == report("--pareto")


def test_ids_of_several_pictures_differ(folder, report):
    folder.add("a [#ff8800]", "GGUF", "a", 4.0, 9.0)
    folder.add("b", "Unheard of", "b", 5.0, 8.0)
    text = report().decode()
    assert "url(#p1-" in text
    assert not re.search(r'url\(#(?!p\d+-)|href="#(?!p\d+-|[a-z-]+")', text)


def test_colours_of_pictures_follow_the_theme(full_report):
    """Only colours that labels name are fixed; no black of matplotlib's defaults remains."""
    text = full_report
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{6}(?![0-9a-zA-Z])", "".join(svgs))) <= {"#12ab34"}
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", "".join(svgs)))
    defined = set(re.findall(r"(--[a-z0-9]+):", text))
    assert used
    assert used <= defined


def test_dark_plot_does_not_follow_the_readers_theme(folder, report):
    folder.add()
    text = report("--dark", command="plot").decode()
    assert "#14171c" in text
    assert "prefers-color-scheme: dark) {" not in text.split("<script")[0]
    assert 'id="theme"' not in text


def test_report_without_a_writable_html_name_is_an_error(folder, compare, tmp_path):
    folder.add()
    assert compare("report", folder.path, "-o", tmp_path / "r.png").code == 1
    assert compare("report", folder.path).code == 1
    assert compare("report", tmp_path / "absent", "-o", tmp_path / "r.html").code == 2
    assert not (tmp_path / "r.html").exists()


def test_report_without_points_lists_the_models(folder, compare, tmp_path):
    folder.add("a", bpw=None)
    out = compare("report", folder.path, "-o", tmp_path / "r.html")
    assert out.code == 0
    text = (tmp_path / "r.html").read_text()
    assert "<svg" not in text
    assert "not drawn: a" in text


def test_every_family_has_a_note():
    assert set(FAMILY_NOTES) == set(FAMILIES)


# ------------------------------------------------------------------ commands that repeat a run


def words_of(text: str | None) -> list[str]:
    """Returns a command's words as a shell splits them."""
    assert text is not None
    return shlex.split(text.replace("\\\n", ""))


def flags_of(text: str | None) -> dict[str, str]:
    """Returns a command's flags and their values."""
    words = words_of(text)
    assert words[:2] == ["lm_eval", "run"]
    return {a: b for a, b in itertools.pairwise(words) if a.startswith("--")}


def test_command_has_the_settings_of_the_run():
    content = result()
    content["config"] |= {"model": "llamacpp", "batch_size": 1, "limit": 5.0, "random_seed": 7, "gen_kwargs": {}}
    content["config"]["model_args"] = {"pretrained": "models/a-Q4_K_M.gguf", "tokenizer": "models/base", "n_threads": 2}
    content["configs"]["wiki2_strided"]["metadata"] |= {"text_path": "wiki test.raw", "warmup_tokens": 0}
    flags = flags_of(command(Run.of(content, "wiki2_strided"), "wiki2_strided"))
    assert flags == {
        "--model": "llamacpp",
        "--model_args": "pretrained=models/a-Q4_K_M.gguf,tokenizer=models/base,n_threads=2",
        "--tasks": "wiki2_strided",
        "--metadata": flags["--metadata"],
        "--limit": "5",
        "--seed": "7,1234,1234,1234",
        "--output_path": "results/",
    }
    assert json.loads(flags["--metadata"]) == {
        "protocol": "exllama", "eval_len": 2048, "stride": 512, "max_rows": 20, "bos": "tokenizer",
        "blank_rows": "keep", "text_path": "wiki test.raw",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": "a b/c,d", "dtype": "bfloat16"},
        {"pretrained": "m", "revision": "1.0"},  # a number for the harness unless quoted
        {"pretrained": "m", "kernel_config": {"linear_backend": "emulation"}, "n": None, "f": 0.5},
        {"pretrained": "m", "enforce_eager": True, "max_length": 4096},
        {"pretrained": 'it\'s; rm -rf ~ $(x) `y` "z"'},
        "pretrained=m,dtype=float32",
    ],
)
def test_harness_parses_the_command_to_the_same_arguments(arguments):
    """The harness' own command-line parser reads the command."""
    import argparse

    from lm_eval._cli.run import Run as HarnessRun

    content = result()
    content["config"] |= {"model": "hf", "model_args": arguments}
    parser = argparse.ArgumentParser()
    HarnessRun(parser.add_subparsers())
    read = parser.parse_args(words_of(command(Run.of(content, "t"), "t"))[1:])
    expected = {"pretrained": "m", "dtype": "float32"} if isinstance(arguments, str) else arguments
    assert read.model_args == expected
    assert read.tasks == ["t"]


def test_command_has_few_shot_chat_and_system_prompt():
    content = result(task="gsm8k")
    content["configs"]["gsm8k"]["metadata"] = {"version": 3.0}
    content["n-shot"]["gsm8k"] = 5
    content |= {"chat_template": "{{ x }}", "system_instruction": "Be brief."}
    text = command(Run.of(content, "gsm8k"), "gsm8k")
    assert flags_of(text)["--num_fewshot"] == "5"
    assert flags_of(text)["--system_instruction"] == "Be brief."
    assert "--apply_chat_template" in words_of(text)
    assert "--metadata" not in words_of(text)


def test_result_without_a_model_has_no_command():
    assert command(Run.of({}, "t"), "t") is None
    assert command(Run(), "t") is None


@pytest.mark.usefixtures("undrawn")
def test_report_warns_of_trust_remote_code(folder, report):
    content = result()
    content["config"]["model_args"]["trust_remote_code"] = True
    folder.write(content)
    assert "lets code that comes with the checkpoint" in report().decode()


# ------------------------------------------------------------------ in a browser

needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="NO BROWSER: chromium and chromedriver are not installed; the page is not tested"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as client:
        yield client


COLUMN = "return [...document.querySelectorAll(`tbody tr > :nth-child(${arguments[0]})`)].map(c => c.textContent)"


def column(browser: Browser, heading: str) -> list[str]:
    """Returns the cells of a column of the table, from top to bottom."""
    headings = browser.run("return [...document.querySelectorAll('thead th')].map(h => h.textContent)")
    return browser.run(COLUMN, headings.index(heading) + 1)


def click_heading(browser: Browser, heading: str) -> None:
    headings = browser.run("return [...document.querySelectorAll('thead th')].map(h => h.textContent)")
    browser.click(f"thead th:nth-child({headings.index(heading) + 1}) button")


@pytest.mark.browser
@needs_browser
def test_table_sorts_and_filters_and_points_show_their_values(folder, report, browser):
    for label, bpw, ppl in (("Q10", 10.0, 8.5), ("Q2", 9.25, 12.25), ("Q9", 9.5, 8.75), ("unknown", None, 9.5)):
        folder.add(label, "GGUF", label, bpw, ppl, 0.1)
    folder.add("BF16", "full precision", "bfloat16", 16.0, 8.0, 0.1)
    with served({"/": report()}) as (address, asked):
        browser.requests()
        browser.open(address + "/")
        assert browser.run("return 'ready' in document.documentElement.dataset")
        click_heading(browser, "bpw")
        assert column(browser, "bpw") == ["9.250", "9.500", "10.000", "16.000", "–"], "sorted as numbers, unknown last"
        click_heading(browser, "bpw")
        assert column(browser, "Model") == ["BF16", "Q10", "Q9", "Q2", "unknown"], "unknown last in both directions"
        click_heading(browser, "Model")
        assert column(browser, "Model") == ["BF16", "Q2", "Q9", "Q10", "unknown"], "numbers in names sort as numbers"
        click_heading(browser, "Perplexity")
        assert [text.split()[0] for text in column(browser, "Perplexity")] == [
            "8.0000", "8.5000", "8.7500", "9.5000", "12.2500",
        ]  # fmt: skip
        assert browser.run("return document.querySelectorAll('th[aria-sort]').length") == 1

        browser.type("#filter", "q9; bf16")
        shown = browser.run(
            "return [...document.querySelectorAll('tbody tr:not([hidden]) th')].map(c => c.textContent)"
        )
        assert shown == ["BF16", "Q9"]

        assert browser.run("return document.querySelector('#tip').hidden")
        index = browser.run(
            "const data = document.querySelector('.plot script').textContent;"
            "return JSON.parse(data).points.findIndex(p => p[''] === 'Q9')"
        )
        browser.point_at(f".plot circle[data-i='{index}']")
        tip = browser.run("return document.querySelector('#tip').textContent")
        assert "Q9" in tip
        assert "8.7500 ± 0.10" in tip
        assert "9.500" in tip
        marker = browser.run(
            "const b = document.querySelector(`.plot circle[data-i='${arguments[0]}']`).getBoundingClientRect();"
            "const under = document.elementsFromPoint(b.x + b.width / 2, b.y + b.height / 2);"
            "return under.some(e => e.closest('[id]') && e.tagName === 'use')", index,
        )  # fmt: skip
        assert marker, "the place to point at lies on the drawn marker"
        browser.point_at("h1")
        assert browser.run("return document.querySelector('#tip').hidden")

        before = browser.run("return getComputedStyle(document.body).backgroundColor")
        browser.click("#theme")
        assert browser.run("return getComputedStyle(document.body).backgroundColor") != before
        assert asked == ["/"]
        assert {url for url in browser.requests() if not url.startswith("data:")} == {address + "/"}


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("command", ["report", "plot"])
def test_hostile_labels_run_nothing_and_fetch_nothing(folder, report, browser, command):
    add_hostile(folder)
    with served({"/": report(command=command)}) as (address, asked):
        browser.console()
        browser.requests()
        browser.open(address + "/")
        assert browser.run("return 'ready' in document.documentElement.dataset"), "our own script ran"
        count = browser.run("return document.querySelectorAll('.plot:first-of-type circle.spot').length")
        assert count == len(HOSTILE) + 2
        for index in range(count):
            browser.run(
                "const s = document.querySelectorAll('circle.spot')[arguments[0]], b = s.getBoundingClientRect();"
                "s.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: b.x, clientY: b.y}))", index,
            )  # fmt: skip
        assert browser.run("return document.title") not in ("pwned", "")
        assert browser.run("return document.querySelectorAll('img, iframe, object, base, form').length") == 0
        assert browser.run("return document.querySelectorAll('#tip *:not(dl, dt, dd, strong)').length") == 0
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert asked == ["/"]
        assert {url for url in browser.requests() if not url.startswith("data:")} == {address + "/"}
        assert [
            line for line in browser.console() if "Content Security Policy" in line or "error" in line.lower()
        ] == []


@pytest.mark.browser
@needs_browser
def test_policy_blocks_a_script_and_an_image_put_into_the_page(folder, report, browser):
    """The content security policy has to work even if escaping failed."""
    folder.add()
    hole = f'<script>{PAYLOAD}</script><img src=x onerror="{PAYLOAD}"><img src=/beacon.png>'.encode()
    page = report().replace(b"</h1>", hole + b"</h1>", 1)
    with served({"/": page}) as (address, asked):
        browser.open(address + "/")
        assert browser.run("return document.title") == "Perplexity of 1 models"
        assert asked == ["/"]


def test_places_of_texts_do_not_depend_on_the_resolution(folder):
    """Texts placed in pixels would move in SVG and PDF, which are drawn at another resolution than PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from compare.comparison.build import build_comparison
    from compare.comparison.comparison import Options
    from compare.plot import figure as pictures
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures import scatter
    from compare.plot.series import arrange
    from compare.results.reading import read_results

    fill_with_ladders(folder, per_family=2)
    options = Options(axis="memory", budget=5, context=8192)
    comparison = build_comparison(read_results([folder.path]).records, options)
    drawing = arrange(comparison, log_y=False)
    settings = PlotSettings()
    with pictures.style_sheet(settings.theme):
        picture = Figure(figsize=(10, 6.4), dpi=200)
        FigureCanvasAgg(picture)
        scatter.Scatter(comparison, drawing, settings).draw(picture, settings, pytest.fail)
        places = []
        for dpi in (200, 72):
            picture.set_dpi(dpi)
            picture.draw_without_rendering()
            boxes = {t.get_text(): t.get_window_extent() for t in picture.axes[0].texts}
            places.append({name: (b.x0 / dpi, b.y0 / dpi) for name, b in boxes.items()})
    assert {"limit 5 GB", "BF16  8.17"} <= set(places[0])
    for name, place in places[0].items():
        assert places[1][name] == pytest.approx(place, abs=0.1), name


def test_hover_spots_are_at_the_markers(folder):
    """The expected place is that of the marker in matplotlib's SVG."""
    import xml.etree.ElementTree as ElementTree

    from compare.comparison.build import build_comparison
    from compare.comparison.comparison import Options
    from compare.plot.kind import PlotSettings
    from compare.plot.pictures.scatter import render_svg
    from compare.plot.series import arrange
    from compare.results.reading import read_results

    folder.add("only", "GGUF", "q", 4.0, 9.0, None)
    comparison = build_comparison(read_results([folder.path]).records, Options())
    drawing = arrange(comparison, log_y=False)
    svg, spots = render_svg(comparison, drawing, PlotSettings(), pytest.fail)
    root = ElementTree.fromstring(svg)
    colour = FAMILIES["GGUF"].light
    uses = [u for u in root.iter("{http://www.w3.org/2000/svg}use") if colour in (u.get("style") or "")]
    places = [(float(u.get("x") or 0), float(u.get("y") or 0)) for u in uses]
    assert len(spots) == 1
    expected = (pytest.approx(spots[0].x * 720, abs=0.05), pytest.approx(spots[0].y * 460.8, abs=0.05))
    assert expected in places


def test_assets_are_small_and_name_no_address():
    folder = Path(__file__).parents[3] / "compare" / "report"
    for name in ("page.js", "page.css"):
        text = (folder / name).read_text()
        assert len(text) < 12_000
        assert "http" not in text


def section_of(text: str, name: str) -> str:
    """Returns the markup of one section of a report."""
    return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]


@pytest.mark.usefixtures("undrawn")
def test_report_shows_the_divergence_of_results_with_a_reference(folder, report):
    fill(folder, samples=False)
    text = report("--metric", "token_perplexity").decode()
    section, page = section_of(text, "divergence"), Page(text)
    assert section.count("<svg") == 3, "means, spread, histogram"
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    section_text = unescape(section)
    for words in ("BF16 in vllm 0.26.0 (bfloat16)", "BF16 in vllm, rounding; BF16 GGUF in llama.cpp",
                  "not to be told from", "Median", "Top-1 agreement", "PPL ratio", "Σ p ln(p / q)",
                  "0.95 to 1"):  # fmt: skip
        assert words in section_text
    tables = section.split('<table class="sortable">')[1:]
    assert len(tables) == 3, "figures; divergence and agreement by confidence"
    content = json.loads(next(f for f in folder.path.rglob("*.json") if "Q4_K_M" in f.read_text()).read_text())
    buckets = content["configs"][TASK]["metadata"]["divergence"]["by_confidence"]
    for table, key in zip(tables[1:], ("kld", "top1_agreement"), strict=True):
        rows = {row.partition("</i>")[2].partition("<")[0]: row for row in table.split("<tr>")[2:]}
        assert set(rows) == {label for _, label, _, _ in LADDER} | {"BF16", "BF16 GGUF"}
        values = [float(value) for value in re.findall(r'data-v="([^"]+)"', rows["GGUF Q4_K_M"])]
        assert values == [bucket[key] for bucket in buckets]


@pytest.mark.usefixtures("undrawn")
def test_report_on_kld_shows_its_plot_once(folder, report):
    fill(folder, samples=False)
    text = report("--metric", "kld", "--x", "bpw").decode()
    assert section_of(text, "divergence").count("<svg") == 2
    assert section_of(text, "plots").count("<svg") == 1


@pytest.mark.usefixtures("undrawn")
def test_report_without_a_reference_has_no_divergence_section(folder, report):
    fill_with_ladders(folder)
    assert 'id="divergence"' not in report().decode()


def test_malformed_divergence_is_left_out_of_the_report(folder, report):
    content, _ = divergent("q")
    content["configs"][TASK]["metadata"]["divergence"] = {"quantiles": 3, "histogram": [], "by_confidence": {}}
    content["results"][TASK]["kld,none"] = None
    folder.write(content)
    text = report("--metric", "token_perplexity").decode()
    assert "not drawn: q" in unescape(section_of(text, "left-out"))
