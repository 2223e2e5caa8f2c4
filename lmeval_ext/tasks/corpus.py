"""The text of a task: its rows, and the text that each protocol makes of them.

A corpus is a list of *rows* as the `wikitext-2-raw-v1` data set has them: a row is one line of the raw file with its
line end, and a line of white space is the empty row "". The hub's data set, a parquet file and the raw file
`wiki.test.raw` give the same rows, and so the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError, first_line

BLANK_LINE = " \n"  # the line of WikiText's raw file for a blank row
SAMPLE = Path(__file__).with_name("sample.txt")


@dataclass(frozen=True)
class Corpus:
    """Rows of text.

    name: what a reader knows the text by, a file or data set. lines: the lines of the raw file that the rows come from,
    None for rows of a data set.
    """

    name: str
    rows: tuple[str, ...]
    lines: tuple[str, ...] | None = None

    def joined(self, blank_rows: str = "keep") -> str:
        r"""Return "\n\n".join(rows), the text of the perplexity scripts of GPTQ, ExLlama and Transformers.

        blank_rows: "keep" (ppl.py, the first compare_q) or "drop" (compare_q since 2026, qbench). The two give
        different tokens, and so different perplexities. Raises UserError for another value.
        """
        if blank_rows not in ("keep", "drop"):
            raise UserError(f"blank_rows={blank_rows!r}: expected keep or drop")
        return "\n\n".join(row for row in self.rows if blank_rows == "keep" or row.strip())

    def first(self, rows: int) -> Corpus:
        """Return the first `rows` rows, blank ones counted (max_text_rows of ExLlamaV3's compare_q)."""
        return Corpus(self.name, self.rows[:rows], self.lines and self.lines[:rows])

    def raw(self) -> str:
        r"""Return the raw file as llama.cpp's `-f` reads it: without the final line end (common/arg.cpp).

        Rows of a data set become the lines that they were in the raw file: "" becomes WikiText's blank line " \n", and
        a row without a line end gets one.
        """
        lines = self.lines or [BLANK_LINE if not row else row.removesuffix("\n") + "\n" for row in self.rows]
        return "".join(lines).removesuffix("\n")


def sha256(text: str) -> str:
    """Return the sha256 of the text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_corpus(text_path: str | Path, text_column: str = "text") -> Corpus:
    """Read the rows of a raw text file, or of the text column of a parquet file.

    Raises UserError if the file is missing, is not UTF-8, has no such column, or holds no text.
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
    """Read the rows of a data set of the hub, or of its local cache, through `datasets`.

    files: pattern of the files to read, for a generic reader (path "parquet", "json", …).

    Raises UserError, which names `text_path` as the way out, if the data set cannot be reached.
    """
    import datasets

    title = " ".join(part for part in (path, name, split, files) if part)
    try:
        table: Any = datasets.load_dataset(path, name, split=split, data_files=files)
    except Exception as error:
        raise UserError(
            f"the data set {title!r} is out of reach ({type(error).__name__}: {first_line(error)}); give a local copy "
            'with --metadata \'{"text_path": "FILE"}\' (raw text or parquet), or use the task sample_strided'
        ) from error
    if text_column not in table.column_names:
        raise UserError(_no_column(f"data set {title!r}", text_column, table.column_names))
    return Corpus(title, _texts(list(table[text_column]), f"data set {title!r}, column {text_column!r},"))


def _raw_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:  # other line ends belong to the text
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
    """Return the data set's row for a line of the raw file: "" for a line of white space."""
    return line if line.strip() else ""


def _texts(rows: list[Any], where: str) -> tuple[str, ...]:
    """Return the rows of a table's column unchanged; a missing row is ""."""
    other = next((row for row in rows if row is not None and not isinstance(row, str)), None)
    if other is not None:
        raise UserError(f"{where} holds {type(other).__name__} values, not text; set text_column to a column of text")
    return tuple(row or "" for row in rows)


def _no_column(where: str, column: str, columns: list[str]) -> str:
    return f"{where} has no column {column!r}; set text_column to one of {', '.join(columns)}"
