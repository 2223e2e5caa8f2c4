"""Arguments that the subcommands share, and the options that follow from them."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from compare.comparison.axis import AXES, MEMORY
from compare.comparison.comparison import Options
from compare.comparison.margins import MarginOption, parse_margin
from compare.console import say
from compare.errors import CompareError
from compare.write import PICTURE_SUFFIXES


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select what is compared."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="result files of the harness, or folders searched for them"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="[TASK/]METRIC",
        help="figure to compare, e.g. mmlu/acc or gsm8k/exact_match,strict-match (default: token_perplexity of the one "
        "task that has it); may be given several times",
    )
    parser.add_argument(
        "--subtasks",
        action="store_true",
        help="compare the subtasks of a group such as mmlu: --metric mmlu/acc --subtasks",
    )
    parser.add_argument(
        "--mean",
        action="store_true",
        help="compare one figure, the unweighted mean over the tasks that every model has",
    )
    parser.add_argument(
        "--x",
        choices=[*AXES, MEMORY],
        help="bpw: bits per weight of the decoder layers (default); vram: decoder and head weights in GB; "
        "file_bpw: bits per weight over all tensors; size: all weights in GB; memory: all weights and the KV cache of "
        "--context tokens in GB (default with --budget); GB are 1024³ bytes",
    )
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="the model that the others are compared with (default: the one whose result says that it is in full "
        "precision, which those of the harness' own models do not)",
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
        help="compare results over different tokens or protocols anyway",
    )


def add_best(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that find the best models: --pareto, --budget, --context."""
    parser.add_argument(
        "--pareto",
        action="store_true",
        help="mark the models that no other model beats in both size and metric, and grey out the rest",
    )
    add_budget(parser)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a memory limit: --budget, --context. Without `add_best` there is no --pareto."""
    parser.set_defaults(pareto=False)
    parser.add_argument(
        "--budget",
        type=_amount,
        metavar="GB",
        help="memory limit; names the best model whose weights (embeddings too) and KV cache fit. 8 means 8 × 1024³ "
        "bytes, what an 8 GB card has. Activations and the engine's buffers come on top. Needs --context",
    )
    parser.add_argument(
        "--context", type=_tokens, metavar="TOKENS", help="tokens in the KV cache, for --budget and --x memory"
    )


def add_margin(parser: argparse.ArgumentParser) -> None:
    """Adds the margin of equivalence, which needs --versus."""
    parser.add_argument(
        "--margin",
        type=_margin,
        action="append",
        default=[],
        metavar="[METRIC=]MARGIN",
        help="with --versus: test whether two models are equivalent, that is, differ by less than this: 1 is one "
        "percentage point of an accuracy, 1%% of a perplexity, kld=0.01 nats; METRIC= names the metric where several "
        "are compared",
    )


def check_margins(arguments: argparse.Namespace) -> tuple[MarginOption, ...]:
    """The margins given. Raises CompareError for one without --versus."""
    margins: tuple[MarginOption, ...] = tuple(arguments.margin)
    if margins and arguments.versus is None:
        raise CompareError(f"--margin {margins[0].text} needs --versus LABEL, the model to be equivalent to")
    return margins


def add_log_y(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for a logarithmic metric axis."""
    parser.add_argument(
        "--log-y",
        action=argparse.BooleanOptionalAction,
        help="logarithmic metric axis (default: for KL divergences only)",
    )


def options_of(arguments: argparse.Namespace, sort: str = "family") -> Options:
    """The options given by `add_selection` and `add_best`. Raises CompareError for flags that contradict each other."""
    budget, context = arguments.budget, arguments.context
    if context is None and (budget is not None or arguments.x == MEMORY):
        flag = "--budget" if budget is not None else "--x memory"
        raise CompareError(f"{flag} needs --context TOKENS, the tokens in the KV cache, e.g. --context 8192")
    if context is not None and budget is None and arguments.x != MEMORY:
        raise CompareError("--context needs --budget GB or --x memory; add one of them")
    return Options(
        metrics=tuple(arguments.metric),
        subtasks=arguments.subtasks,
        mean=arguments.mean,
        axis=arguments.x or (MEMORY if budget is not None else "bpw"),
        pareto=arguments.pareto,
        budget=budget,
        context=context,
        mask=arguments.mask,
        max_x=arguments.max_x,
        max_y=arguments.max_y,
        allow_mixed=arguments.allow_mixed,
        baseline=arguments.baseline,
        sort=sort,
    )


def show_text(text: str, output: Path | None, about: str = "") -> None:
    """Writes a text to standard output, or to `output`, and then says so. Raises CompareError if it cannot be written.

    about: what the message adds, `` (7 models)``.
    """
    if output is None:
        sys.stdout.write(text)
        return
    from compare.files import write_output

    write_output(output, text.encode("utf-8", "backslashreplace"))
    say(f"wrote {output}{about}")


def check_picture_name(flag: str, file: Path) -> None:
    """Raises CompareError if no picture can have this name."""
    if file.suffix.lower() not in PICTURE_SUFFIXES:
        raise CompareError(f"{flag} {file}: expected a name that ends in .png, .svg, .pdf or .html")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError
    return value


def _limit(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _margin(text: str) -> MarginOption:
    try:
        return parse_margin(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a number above 0, in points (1) or with % for perplexities (1%), or METRIC=MARGIN"
        ) from None
