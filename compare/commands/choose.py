"""``compare choose``: which quantization to run, in sentences, with the figures behind them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from compare.commands.common import add_budget, add_selection, options_of, show_text
from compare.comparison.build import build_comparisons
from compare.comparison.choice import Answer
from compare.comparison.load import load_records
from compare.console import say
from compare.errors import CompareError
from compare.metrics import KLD
from compare.results.records import Record
from compare.text import show_controls

HELP = "say which model to run: within noise of the original, smallest for a loss, best in a memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    add_budget(parser)
    parser.add_argument(
        "--max-loss",
        metavar="LOSS",
        help="largest loss against the original, in the metric's unit: 0.05 (nats of KL divergence), 2%% (of "
        "perplexity), 1 (point of accuracy); names the smallest model that loses no more",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")


def run(arguments: argparse.Namespace) -> int:
    if arguments.allow_mixed:
        raise CompareError("compare choose chooses among comparable results alone: leave out --allow-mixed")
    options = options_of(arguments)
    records = load_records(arguments.paths)
    metrics = options.metrics or _default(records)
    comparisons = build_comparisons(records, replace(options, metrics=metrics))
    answers = [(c, Answer(c)) for c in comparisons]
    if arguments.max_loss is not None and len(answers) > 1:
        raise CompareError("--max-loss is a loss of one metric: name one --metric")
    if arguments.max_loss is not None:
        comparison, answer = answers[0]
        answers = [(comparison, Answer(comparison, answer.scale.limit(arguments.max_loss)))]
    for comparison in comparisons:
        for notice in comparison.notices:
            say(notice)
    if arguments.format == "json":
        shown = json.dumps([_plain(answer) for _, answer in answers], indent=2, ensure_ascii=False) + "\n"
    else:
        texts = [[show_controls(s.text) for s in answer.sentences()] for _, answer in answers]
        shown = "\n".join("\n".join(lines) + "\n" for lines in texts)
    show_text(shown, arguments.output)
    return 0


def _default(records: list[Record]) -> tuple[str, ...]:
    """The KL divergence where a run was measured against a reference; else the perplexity, as in the other commands."""
    return (KLD,) if any(f"{KLD},none" in r.metrics and r.divergence is not None for r in records) else ()


def _plain(answer: Answer) -> dict[str, object]:
    sentences = [
        {"kind": s.kind, "text": s.text, "models": list(s.labels), "figures": s.figures} for s in answer.sentences()
    ]
    return {"metric": answer.comparison.metric.label, "sentences": sentences}
