"""The frame of a self-contained page: what it may do, its colours, its script.

The content security policy allows the one script that stands here, by its hash, and nothing from anywhere else: text
that found a way into the markup could still not run, nor make the browser fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from compare.plot.style import DARK, LIGHT
from compare.report.pictures import palette

_HERE = Path(__file__).parent
# Page colours that a picture has none of: what stands out from the ground, hair lines, links, warnings.
_MORE = {
    "raised": ("#f5f6f8", "#1d2127"),
    "line": ("#dfe2e7", "#313741"),
    "link": ("#1659c7", "#7db2ff"),
    "warn": ("#9a3b00", "#ffb27a"),
}


def page(title: str, body: str, colours: dict[str, str] | None = None, dark: bool = False, bare: bool = False) -> bytes:
    """A whole HTML file. title: text; body: markup; colours: of the pictures (`pictures.palette`).

    dark: dark whatever the reader's system says; otherwise as the system says, with a button, and light in print.
    """
    style = f"{_variables(colours or {}, dark)}\n{_read('page.css')}"
    script = _read("page.js")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    button = "" if dark else '<button id="theme" type="button">Dark</button>'
    frame = (
        f'<main class="bare">{button}{body}</main>'
        if bare
        else f"<main>{body.replace('<!--theme-->', button, 1)}</main>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer"><meta name="generator" content="compare">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n'
        f"<body>{frame}\n<script>{script}</script></body></html>\n"
    ).encode("utf-8", "backslashreplace")


def _variables(colours: dict[str, str], dark: bool) -> str:
    names = {"ground": (LIGHT.ground, DARK.ground), "ink": (LIGHT.ink, DARK.ink), "soft": (LIGHT.soft, DARK.soft)}
    pairs = {f"--{name}": pair for name, pair in (names | _MORE).items()}
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
