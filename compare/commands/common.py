"""Arguments and first steps that the subcommands share."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from compare.comparison import AXES, Comparison, Options, build_comparison
from compare.errors import NOTHING_USABLE, CompareError
from compare.text import clean


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what is compared."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="result files, or folders searched for results_*.json"
    )
    parser.add_argument(
        "--metric",
        metavar="[TASK/]METRIC",
        help="figure to compare, e.g. wiki2_strided/top1_accuracy "
        "(default: token_perplexity of the one task that has it)",
    )
    parser.add_argument(
        "--x",
        choices=list(AXES),
        default="bpw",
        help="bpw: bits per weight of the decoder layers (default); vram: decoder and head weights in GB; "
        "file_bpw: bits per weight over all tensors; size: all weights in GB",
    )
    parser.add_argument(
        "--mask",
        metavar='"A;B"',
        help="keep only models whose label contains one of these strings, upper and lower case alike "
        "(the meaning of -mask in ExLlamaV3's compare_q)",
    )
    parser.add_argument("--max-x", type=_limit, metavar="X", help="leave out points beyond X (they are named)")
    parser.add_argument("--max-y", type=_limit, metavar="Y", help="leave out points beyond Y (they are named)")
    parser.add_argument(
        "--allow-mixed",
        action="store_true",
        help="compare results over different tokens or protocols all the same",
    )


def _limit(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def load_comparison(arguments: argparse.Namespace, sort: str = "family") -> Comparison:
    """Read the files, build the comparison, and say on stderr what was skipped, replaced or left out."""
    from compare.reading import read_results

    reading = read_results(arguments.paths)
    for problem in reading.problems:
        say(f"skipped: {problem.path}: {problem.reason}")
    if not reading.records:
        raise CompareError("no usable result file (results_*.json) in the paths given", NOTHING_USABLE)
    comparison = build_comparison(
        reading.records,
        Options(
            metric=arguments.metric,
            axis=arguments.x,
            mask=arguments.mask,
            max_x=arguments.max_x,
            max_y=arguments.max_y,
            allow_mixed=arguments.allow_mixed,
            sort=sort,
        ),
    )
    for notice in comparison.notices:
        say(notice)
    return comparison


def say(message: str) -> None:
    """One line on stderr; what file names or labels hold cannot act on the terminal."""
    print(f"compare: {clean(message)}", file=sys.stderr)
