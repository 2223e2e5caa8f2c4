"""Data sets of the conformance tasks: written for this project, or found in installed packages, or WikiText-2."""

from __future__ import annotations

import importlib.resources
import os
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

Splits = dict[str, Dataset]

_FACTS = [
    ("Which planet is nearest to the sun?", ["Venus", "Mercury", "Mars", "Earth"], 1),
    ("What do bees make?", ["honey", "wool", "milk", "paper"], 0),
    ("How many legs has a spider?", ["four", "six", "eight", "ten"], 2),
    ("Which of these is frozen water?", ["sand", "steam", "glass", "ice"], 3),
    ("What colour is grass?", ["green", "blue", "red", "a light grey"], 0),
    ("What is the capital of Iceland?", ["Oslo", "Nuuk", "Reykjavík", "a town in the south"], 2),
    ("What does a thermometer measure?", ["weight", "temperature", "time", "sound"], 1),
    ("Which season follows winter?", ["summer", "autumn", "winter again", "spring"], 3),
    ("What is 火山 in English?", ["volcano", "river", "bread", "mountain hut"], 0),
    ("Which animal barks?", ["the cat", "the dog", "the fish", "the snail"], 1),
]
_ENDINGS = [
    "The volcano on the island began to erupt. Ash fell on every roof near the volcano",
    "She lost her key in the snow and went back along the road until she found the key",
    "Bread is made of flour, water and salt. Without flour there is no bread",
    "The lighthouse keeper lit the lamp every evening and put out the lamp every morning",
    "Þóra saw a whale from the harbour, and nobody else in town believed in the whale",
]


def facts(**_: Any) -> Splits:
    """Questions of four answers; the first three are examples."""
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in _FACTS]
    return {"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}


def endings(**_: Any) -> Splits:
    """Passages whose last word is to be guessed, as LAMBADA's."""
    rows = [{"text": text} for text in _ENDINGS]
    return {"train": Dataset.from_list(rows[:2]), "test": Dataset.from_list(rows[2:])}


def sums(**_: Any) -> Splits:
    """Small sums, in words that a model can go on with."""
    pairs = [(a, b) for a in range(2, 9) for b in range(2, 9)]
    random.Random(0).shuffle(pairs)
    rows = [{"question": f"{a} plus {b}", "answer": str(a + b)} for a, b in pairs]
    return {"train": Dataset.from_list(rows[:4]), "test": Dataset.from_list(rows[4:10])}


def flowers(**_: Any) -> Splits:
    """Fisher's iris measurements in words; from scikit-learn."""
    from sklearn.datasets import load_iris

    data = load_iris()
    rows = [
        {
            "text": f"A flower: sepals {a} cm long and {b} cm wide, petals {c} cm long and {d} cm wide.",
            "species": [str(name) for name in data.target_names],
            "answer": int(target),
        }
        for (a, b, c, d), target in zip(data.data.tolist(), data.target, strict=True)
    ]
    random.Random(0).shuffle(rows)
    return {"train": Dataset.from_list(rows[:10]), "test": Dataset.from_list(rows[10:])}


def pages(**_: Any) -> Splits:
    """What scikit-learn says of three of its data sets: reStructuredText of 2 to 5 kB."""
    folder = importlib.resources.files("sklearn.datasets.descr")
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("iris.rst", "diabetes.rst", "linnerud.rst")]
    return {"test": Dataset.from_list([{"page": text} for text in texts])}


def wikitext_documents(**_: Any) -> Splits:
    """WikiText-2's test split, a row an article, the shortest first. WIKITEXT2_DIR names the folder."""
    import pyarrow.parquet as pq

    (file,) = Path(os.environ["WIKITEXT2_DIR"]).glob("test-*.parquet")
    articles: list[str] = []
    for line in pq.read_table(file)["text"].to_pylist():
        if re.match(r"^ = [^=].* = \n$", line):
            articles.append("")
        if articles:  # the split begins with an empty row
            articles[-1] += line
    return {"test": Dataset.from_list([{"page": text} for text in sorted(articles, key=len)])}


def detokenized(doc: dict[str, Any]) -> str:
    """As the harness' `wikitext` does it."""
    return str(wikitext_detokenizer(doc))


def by_words_and_bytes(doc: dict[str, Any], results: Any) -> dict[str, Any]:
    """As the harness' `wikitext` does it: of the text before detokenization."""
    return dict(process_results(doc, results))


def plain(doc: dict[str, Any]) -> str:
    return str(doc["page"])


def context(doc: dict[str, Any]) -> str:
    return str(doc["text"].rsplit(" ", 1)[0])


def last_word(doc: dict[str, Any]) -> str:
    return " " + str(doc["text"].rsplit(" ", 1)[1])
