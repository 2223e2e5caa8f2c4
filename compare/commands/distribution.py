"""``compare plot --spread``, ``--histogram`` and ``--by-position``: how a metric varies over tokens."""

from __future__ import annotations

import argparse

from compare.commands.common import options_of
from compare.errors import CompareError
from compare.metrics import KLD
from compare.plot.pictures import DISTRIBUTIONS, distribution_kind, flag_of
from compare.write import PlotRequest, write_distributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per kind of `DISTRIBUTIONS`."""
    kinds = parser.add_mutually_exclusive_group()
    for name, text in DISTRIBUTIONS.items():
        kinds.add_argument(
            flag_of(name), dest="distribution", action="store_const", const=name, help=text.replace("%", "%%")
        )


def run(arguments: argparse.Namespace, request: PlotRequest) -> int:
    """Draws the distributions of the one task that has them, or of the one named."""
    name: str = arguments.distribution
    _check(arguments, name, request)
    write_distributions(arguments.paths, options_of(arguments), request, name)
    return 0


def _check(arguments: argparse.Namespace, name: str, request: PlotRequest) -> None:
    """Raises CompareError for flags that have no meaning together."""
    flag = flag_of(name)
    for other in distribution_kind(name).excluded_flags:
        value = getattr(arguments, other.removeprefix("--"))
        if value is not None and value is not False:
            raise CompareError(f"{flag} shows distributions; {other} cannot be combined with it")
    if len(arguments.metric) > 1:
        raise CompareError(f"{flag} draws one task: name it, --metric TASK/{KLD}")
    if request.output is not None and request.output.suffix.lower() == ".html":
        raise CompareError(f"{flag} writes .png, .svg or .pdf; compare report puts it on a page")
