"""``compare plot --spread`` and ``--histogram``: not one figure a model, but how it is spread over the tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from compare.commands.common import options_of
from compare.comparison.load import load_comparisons
from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError
from compare.metrics import KLD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--spread",
        action="store_true",
        help="a box a model: median, quartiles, 5, 95 and 99 %% of the tokens' KL divergence, size across",
    )
    kind.add_argument(
        "--histogram", action="store_true", help="a line a model: how many tokens have which KL divergence"
    )


def run(arguments: argparse.Namespace, output: Path | None) -> int:
    """Draw the picture that was asked for, of the one task with divergences or the one named."""
    flag = "--spread" if arguments.spread else "--histogram"
    _check(arguments, flag, output)
    arguments.metric = arguments.metric or [KLD]
    (comparison,) = load_comparisons(arguments.paths, options_of(arguments))
    if comparison.metric.metric != KLD:
        raise CompareError(f"{flag} is of {KLD} only, not of {comparison.metric.label}")
    from compare.plot import distributions, figure
    from compare.plot.pictures import histogram, spread

    settings = figure.PlotSettings(title=arguments.title, dark=arguments.dark)
    find = distributions.boxes if arguments.spread else distributions.histograms
    found = find(comparison)
    for message in found.left_out:
        say(message)
    if not found.points:
        raise CompareError(f"nothing to draw: no result has what {flag} shows", NOTHING_USABLE)
    if arguments.spread:
        picture = spread.picture(comparison, found, settings, arguments.log_y is not False)
    else:
        picture = histogram.picture(comparison, found, settings, bool(arguments.log_y))
    if output is None:
        figure.show(picture, settings, say)
        return 0
    from compare.files import write_output

    write_output(output, figure.render(picture, settings, output.suffix[1:].lower(), say))
    say(f"wrote {output} ({len(found.points)} models)")
    return 0


def _check(arguments: argparse.Namespace, flag: str, output: Path | None) -> None:
    """What makes no sense together is refused, not passed over."""
    others = {
        "--pareto": arguments.pareto, "--budget": arguments.budget is not None, "--mean": arguments.mean,
        "--subtasks": arguments.subtasks, "--x": arguments.x is not None and arguments.histogram,
    }  # fmt: skip
    for other, given in others.items():
        if given:
            raise CompareError(f"{flag} shows distributions; {other} is not for it")
    if len(arguments.metric) > 1:
        raise CompareError(f"{flag} draws one task: name it, --metric TASK/{KLD}")
    if output is not None and output.suffix.lower() == ".html":
        raise CompareError(f"{flag} writes .png, .svg or .pdf; compare report puts it on a page")
