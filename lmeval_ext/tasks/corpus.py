"""Where the text comes from, joined exactly as each protocol wants.

A corpus is a list of *rows* as the `wikitext-2-raw-v1` data set has them: a row is one line of the raw
file with its line end, and a line of white space only is the empty row "". The same rows come from the
hub's data set, from a parquet file, and from the raw file `wiki.test.raw`, so all give the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

BLANK_LINE = " \n"  # a blank row as WikiText's raw file spells it
SAMPLE = Path(__file__).with_name("sample.txt")


@dataclass(frozen=True)
class Corpus:
    """Rows of text and the name under which a person knows them; with the `lines` of a raw file they come from."""

    name: str
    rows: tuple[str, ...]
    lines: tuple[str, ...] | None = None

    def joined(self, blank_rows: str = "keep") -> str:
        r""" "\n\n".join(rows), as the perplexity scripts of GPTQ, ExLlama and Transformers have it.

        `blank_rows`: "keep" (ppl.py, the first compare_q) or "drop" (compare_q since 2026, qbench): other
        tokens, other numbers.
        """
        if blank_rows not in ("keep", "drop"):
            raise UserError(f"blank_rows={blank_rows!r}: expected keep or drop")
        return "\n\n".join(r for r in self.rows if blank_rows == "keep" or r.strip())

    def first(self, rows: int) -> Corpus:
        """The first `rows` rows, blank ones counted (max_text_rows of ExLlamaV3's compare_q)."""
        return Corpus(self.name, self.rows[:rows], self.lines and self.lines[:rows])

    def raw(self) -> str:
        r"""The raw file as llama.cpp's `-f` reads it: without the final line end (common/arg.cpp).

        Rows of a data set become the lines they were in the raw file: "" is WikiText's blank line " \n", and a row
        without a line end gets one.
        """
        lines = self.lines or [BLANK_LINE if not row else row.removesuffix("\n") + "\n" for row in self.rows]
        return "".join(lines).removesuffix("\n")


def sha256(text: str) -> str:
    """sha256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_corpus(text_path: str | Path, text_column: str = "text") -> Corpus:
    """Rows of a raw text file, or of a parquet file's text column.

    Raises UserError where the file is missing, is not UTF-8, or has no such column.
    """
    path = Path(text_path or "").expanduser()
    if not path.is_file():
        raise UserError(f"text_path={str(text_path)!r}: no such file; give a raw text file or a parquet file")
    lines = None if path.suffix == ".parquet" else _raw_lines(path)
    rows = _parquet_rows(path, text_column) if lines is None else [_row(line) for line in lines]
    if not any(row.strip() for row in rows):
        raise UserError(f"text_path={str(text_path)!r} holds no text")
    return Corpus(path.name, tuple(rows), None if lines is None else tuple(lines))


def load_hub_corpus(path: str, name: str | None, split: str, text_column: str, files: str | None = None) -> Corpus:
    """Rows of a data set of the hub (or of its local cache), through `datasets`.

    files: pattern of the files that a generic reader (path "parquet", "json", …) shall read.

    Raises UserError that names `text_path` where the data set is out of reach.
    """
    import datasets

    title = " ".join(part for part in (path, name, split, files) if part)
    try:
        table: Any = datasets.load_dataset(path, name, split=split, data_files=files)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the data set {title!r} is out of reach ({type(error).__name__}: {reason}); give a local copy with "
            '--metadata \'{"text_path": "FILE"}\' (raw text or parquet), or use the task sample_strided'
        ) from error
    if text_column not in table.column_names:
        raise UserError(_no_column(f"data set {title!r}", text_column, table.column_names))
    return Corpus(title, _texts(list(table[text_column]), f"data set {title!r}, column {text_column!r},"))


def _raw_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:  # other line ends are text, not row ends
            return list(lines)
    except UnicodeDecodeError as error:
        raise UserError(f"text_path={str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parquet_rows(path: Path, column: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise UserError(_no_column(f"text_path={str(path)!r}", column, names))
        rows = parquet.read_table(path, columns=[column]).column(column).to_pylist()
        return list(_texts(rows, f"text_path={str(path)!r}, column {column!r},"))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"text_path={str(path)!r} is not a readable parquet file ({error})") from error


def _row(line: str) -> str:
    """A line of a raw file as the data set has it: white space alone is the empty row."""
    return line if line.strip() else ""


def _texts(rows: list[Any], where: str) -> tuple[str, ...]:
    """Rows of a table's column, as they are; a missing one is empty."""
    wrong = next((r for r in rows if r is not None and not isinstance(r, str)), None)
    if wrong is not None:
        raise UserError(f"{where} holds {type(wrong).__name__} values, not text; set text_column to a column of text")
    return tuple(r or "" for r in rows)


def _no_column(where: str, column: str, columns: list[str]) -> str:
    return f"{where} has no column {column!r}; set text_column to one of {', '.join(columns)}"
