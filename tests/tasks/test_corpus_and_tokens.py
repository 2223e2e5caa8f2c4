"""Texts and tokens: the published figures of the data set, and every rule for BOS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmeval_ext.errors import UserError
from lmeval_ext.tasks.corpus import SAMPLE, Corpus, load_hub_corpus, read_corpus, sha256
from lmeval_ext.tasks.tokenizers import load_tokenizer
from lmeval_ext.tokens import HFTokenizer, tokenize

JOINED = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"  # "\n\n".join of the hub's rows


def test_raw_file_and_parquet_are_the_published_rows(wikitext: Path) -> None:
    raw = read_corpus(wikitext / "wiki.test.raw")
    parquet = read_corpus(next(wikitext.glob("*.parquet")))
    assert raw.rows == parquet.rows
    assert len(raw.rows) == 4358
    assert len(raw.joined()) == 1_294_336
    assert sha256(raw.joined()) == sha256(parquet.joined()) == JOINED
    assert parquet.raw() == (wikitext / "wiki.test.raw").read_bytes().decode().removesuffix("\n")


def test_blank_rows_are_kept_or_dropped() -> None:
    corpus = Corpus("x", ("a\n", "", "b\n"))
    assert corpus.joined() == "a\n\n\n\n\nb\n"
    assert corpus.joined("drop") == "a\n\n\nb\n"
    assert corpus.raw() == "a\n \nb"
    with pytest.raises(UserError, match="blank_rows='maybe': expected keep or drop"):
        corpus.joined("maybe")


def test_bundled_text_is_long_enough_for_an_error_bar() -> None:
    """20 windows of 2048 every 512 need 11,777 tokens; English has about 1.3 tokens per word."""
    corpus = read_corpus(SAMPLE)
    assert sum(len(r.split()) for r in corpus.rows) > 9_500
    assert sum(r.startswith(" = ") for r in corpus.rows) > 20


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"\xff\xfe\x00", "not UTF-8"), (b" \n\n", "holds no text")],
)
def test_unusable_text_path_raises(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_corpus(path)
    assert "text.txt" in str(caught.value)


def test_unusable_parquet_raises(tmp_path: Path) -> None:
    import pandas

    broken, other = tmp_path / "broken.parquet", tmp_path / "other.parquet"
    broken.write_bytes(b"PAR1 not really")
    pandas.DataFrame({"body": ["x"]}).to_parquet(other)
    with pytest.raises(UserError, match="not a readable parquet"):
        read_corpus(broken)
    with pytest.raises(UserError, match="no column 'text'; set text_column to one of body"):
        read_corpus(other)
    assert read_corpus(other, "body").rows == ("x",)


def test_unreachable_hub_error_names_text_path() -> None:
    with pytest.raises(UserError, match="text_path"):
        load_hub_corpus("nobody/no-such-data-set", None, "test", "text")


def test_bos_modes_follow_the_tokenizer(tiny_tokenizer: Path, bos_tokenizer: Path) -> None:
    plain, with_bos = HFTokenizer(str(tiny_tokenizer)), HFTokenizer(str(bos_tokenizer))
    assert (plain.prefix, with_bos.prefix) == ([], [0])
    text = "Iceland is an island."
    ids = plain.encode(text).ids.tolist()

    def result(tokenizer: HFTokenizer, bos: str, each: bool = False) -> tuple[list[int], str, int | None]:
        sequence = tokenize(text, tokenizer, bos, each)
        return sequence.ids.tolist(), sequence.bos, sequence.window_bos

    assert result(plain, "tokenizer") == (ids, "none", None)
    assert result(with_bos, "tokenizer") == ([0, *ids], "once", None)
    assert result(with_bos, "none") == (ids, "none", None)
    assert result(plain, "once") == ([0, *ids], "once", None)
    assert result(plain, "each") == ([0, *ids], "each", 0)
    # as llama.cpp does it: in every window, if and only if the vocabulary adds BOS
    assert result(with_bos, "tokenizer", each=True) == ([0, *ids], "each", 0)
    assert result(plain, "tokenizer", each=True) == (ids, "none", None)
    with pytest.raises(UserError, match="bos='first'"):
        tokenize(text, plain, "first", False)


def test_byte_ends_count_utf8(tiny_tokenizer: Path) -> None:
    text = "Ísland – 東京 🙂 end"
    encoded = HFTokenizer(str(tiny_tokenizer)).encode(text)
    assert encoded.byte_ends is not None
    assert encoded.byte_ends[-1] == len(text.encode())
    assert (np.diff(encoded.byte_ends) >= 0).all()


def test_missing_tokenizer_error_says_what_to_name() -> None:
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer({})
    with pytest.raises(UserError, match="tokenizer='/nowhere' could not be loaded"):
        load_tokenizer({"pretrained": "/nowhere"})
