"""The table for the terminal, drawn by rich; thousands of rows are plain columns."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

from compare.comparison.comparison import Comparison
from compare.table.columns import Section, sections
from compare.text import shorten

_MAX_LABEL = 72
_MANY_ROWS = 500
_FOLDED = {"Model": 14, "Verdict": 18}  # least widths of columns that need more room than other texts


def print_terminal(comparisons: Sequence[Comparison], title: str | None = None, stream: IO[str] | None = None) -> None:
    """Writes the terminal table to `stream` (standard output), as wide as the terminal or, elsewhere, as needed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    console = Console(file=stream, highlight=False, markup=False, emoji=False, width=None if narrow else 240)
    if title:
        console.print(Text(title, style="bold"))
    for section in (section for comparison in comparisons for section in sections(comparison)):
        console.print(Text(section.caption, style="dim" if section.caption.startswith("Not") else ""))
        if len(section.rows) > _MANY_ROWS:
            stream.write(_plain(section))
            _note(console, section)
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        needed = _least_widths(section)
        for heading, right, width in zip(section.headings, section.right, needed, strict=True):
            table.add_column(Text(heading), justify="right" if right else "left", no_wrap=right, overflow="fold",
                             min_width=width)  # fmt: skip
        for cells in section.rows:
            table.add_row(*(Text(shorten(cell, _MAX_LABEL)) for cell in cells))
        shown = console.width
        console.width = max(shown, sum(needed) + 3 * len(needed) + 2)
        console.print(table)
        console.width = shown
        _note(console, section)
        console.print()


def _least_widths(section: Section) -> list[int]:
    """The least width of each column. Figures are never cut (a narrow terminal wraps the line); texts fold."""
    from rich.cells import cell_len

    widths = []
    for i, (heading, right) in enumerate(zip(section.headings, section.right, strict=True)):
        widest = max(cell_len(text) for text in (heading, *(cells[i] for cells in section.rows)))
        widths.append(widest if right else min(widest, _FOLDED.get(heading, 6)))
    return widths


def _note(console: Any, section: Section) -> None:
    from rich.text import Text

    if section.note:
        console.print(Text(section.note, style="dim"))


def _plain(section: Section) -> str:
    """The section in columns of blanks, unstyled: rich takes a millisecond per row, too long for thousands."""
    from rich.cells import cell_len

    lines = [section.headings, *([shorten(cell, _MAX_LABEL) for cell in cells] for cells in section.rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(section.headings))]
    text = []
    for line in lines:
        cells = []
        for cell, width, right in zip(line, widths, section.right, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if right else cell + blanks)
        text.append("   ".join(cells).rstrip() + "\n")
    return "".join([*text, "\n"])


def render_terminal(comparisons: Sequence[Comparison], title: str | None = None) -> str:
    """The terminal table as text, for a file."""
    stream = io.StringIO()
    print_terminal(comparisons, title, stream)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
