"""Text for output. Labels are untrusted: their content is shown as text, never interpreted.

A label may have a colour in brackets at its start or end, as in ExLlamaV3's plots: ``"[#ff8800] My model"``,
``"My model [red]"``. `split_colour_tag` removes it.
"""

from __future__ import annotations

import math
import re
import unicodedata

# Control, format (including bidirectional overrides), surrogate and private-use characters: a terminal or an XML
# parser could act on them, or they could mislead a reader. Joiners and variation selectors stay: emoji need them.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co"}
_HARMLESS_FORMAT = {"\u200c", "\u200d"}
_TAG = re.compile(r"\[\s*(#[0-9a-fA-F]{3,8}|[A-Za-z][\w:. -]*?)\s*\]")


def clean(text: str) -> str:
    """One line of printable text: runs of white space become one blank, unsafe characters an escape (``\\x1b``)."""
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    return " ".join("".join(_visible(c) for c in text).split())


def show_controls(text: str) -> str:
    """The text with unsafe characters as escapes; white space, line ends included, stays."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" else " " if c.isspace() else _visible(c) for c in text)


def _visible(char: str) -> str:
    if char.isspace() or char in _HARMLESS_FORMAT:
        return char if char in _HARMLESS_FORMAT else " "
    if unicodedata.category(char) not in _UNSAFE_CATEGORIES:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def split_colour_tag(label: str) -> tuple[str, str | None]:
    """``("My model", "red")`` for ``"My model [red]"``; ``(label, None)`` for a label without a colour tag.

    In a label with several brackets only an existing colour is a tag, so that markup such as ``[bold]x[/bold]`` stays
    text.
    """
    if "[" not in label:
        return label, None
    for match in (_TAG.match(label), *reversed(list(_TAG.finditer(label)))):
        if match is None or (match.start() != 0 and match.end() != len(label)):
            continue
        if label.count("[") == 1 or is_colour(match[1]):
            return clean(label[: match.start()] + " " + label[match.end() :]), match[1]
    return label, None


def is_colour(name: str) -> bool:
    """Whether matplotlib knows this colour name or ``#hex`` value ("none" is not a colour)."""
    if name.startswith("#"):
        return len(name) in (4, 5, 7, 9)
    from matplotlib.colors import is_color_like

    return name.lower() != "none" and is_color_like(name)


def shorten(text: str, width: int) -> str:
    """At most `width` characters, leaving out the middle, since the ends of a label distinguish models."""
    if len(text) <= width:
        return text
    tail = width // 3
    return f"{text[: width - tail - 1].rstrip()}…{text[-tail:].lstrip()}"


_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|$~&])")


def markdown(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)


def csv_cell(text: str) -> str:
    """Text for a CSV cell; an apostrophe in front keeps a spreadsheet from running it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def and_more(names: list[str], limit: int = 8) -> str:
    """``"a, b, c"``, or ``"a, b, … and 7 more"`` past `limit` names."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def figure_text(value: float | None, digits: str) -> str:
    """The value in the format `digits`, ``".3f"``; a dash for None."""
    return "–" if value is None else format(value, digits)


def metric_text(value: float | None, stderr: float | None = None) -> str:
    """``25.0648 ± 0.87``: four decimals (four digits below 0.1 and from a million on), the error to two digits; a dash
    for None.
    """
    if value is None:
        return "–"
    text = f"{value:.4f}" if 0.1 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    return text if stderr is None else f"{text} ± {_two_digits(stderr)}"


def _two_digits(value: float) -> str:
    if value < 1e-4 or value >= 1e6:
        return f"{value:.2g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def signed_text(value: float, half_width: float | None) -> str:
    """The value with its sign, and with as many decimals as give the half width two digits."""
    if not half_width or not 1e-6 < half_width < 1e6:
        return f"{value:+.3g}"
    return f"{value:+.{max(0, 1 - math.floor(math.log10(half_width)))}f}"


def round_up(number: int) -> int:
    """A whole number rounded up to two significant digits: 9,741 as 9,800."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
