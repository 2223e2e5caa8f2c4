"""The frame of a self-contained page: content security policy, colours, script.

The content security policy allows the one script of the page, by its hash, and nothing from anywhere else: text that
reached the markup could still not run, nor make the browser fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from compare.plot.style import DARK, LIGHT
from compare.report.pictures import palette
from compare.report.templating import render, trusted

_HERE = Path(__file__).parent
# Page colours that no picture has: raised ground, hair lines, links, warnings; light and dark.
_PAGE_COLOURS = {
    "raised": ("#f5f6f8", "#1d2127"),
    "line": ("#dfe2e7", "#313741"),
    "link": ("#1659c7", "#7db2ff"),
    "warn": ("#9a3b00", "#ffb27a"),
}


def page(template: str, title: str, colours: dict[str, str], dark: bool, **values: object) -> bytes:
    """Renders a template as a complete HTML file.

    title: text; colours: those of the pictures (`pictures.palette`); values: further values of the template.
    dark: dark whatever the reader's system says; otherwise as the system says, with a button, and light in print.
    """
    script = _read("page.js")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    frame: dict[str, object] = {
        "policy": policy,
        "title": title,
        "style": trusted(f"{_variables(colours, dark)}\n{_read('page.css')}"),
        "script": trusted(script),
        "dark": dark,
    }
    return render(template, frame | values).encode("utf-8", "backslashreplace")


def _variables(colours: dict[str, str], dark: bool) -> str:
    """The CSS variables of both themes, or of the dark one alone."""
    names = {"ground": (LIGHT.ground, DARK.ground), "ink": (LIGHT.ink, DARK.ink), "soft": (LIGHT.soft, DARK.soft)}
    pairs = {f"--{name}": pair for name, pair in (names | _PAGE_COLOURS).items()}
    pairs |= {f"--c{light[1:]}": (light, other) for light, other in (palette() | colours).items()}
    lights = " ".join(f"{name}: {light};" for name, (light, _) in pairs.items())
    darks = " ".join(f"{name}: {other};" for name, (_, other) in pairs.items())
    if dark:
        return f":root {{ color-scheme: dark; {darks} }}"
    return (
        f":root {{ color-scheme: light; {lights} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {darks} }} }}\n"
        f":root[data-theme=light] {{ color-scheme: light; {lights} }}\n"
        f":root[data-theme=dark] {{ color-scheme: dark; {darks} }}\n"
        f"@media print {{ :root:root:root {{ color-scheme: light; {lights} }} }}"
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
