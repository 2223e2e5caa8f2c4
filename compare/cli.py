"""The command line: a table of subcommands, each a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from compare.commands import attribute, choose, domains, plot, report, run, table, traces
from compare.console import say
from compare.errors import USAGE, CompareError
from compare.text import clean


class Subcommand(NamedTuple):
    """One subcommand: its line in the help, and the two functions of its module in `compare.commands`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


SUBCOMMANDS: dict[str, Subcommand] = {
    "run": Subcommand(run.HELP, run.add_arguments, run.run),
    "traces": Subcommand(traces.HELP, traces.add_arguments, traces.run),
    "table": Subcommand(table.HELP, table.add_arguments, table.run),
    "plot": Subcommand(plot.HELP, plot.add_arguments, plot.run),
    "choose": Subcommand(choose.HELP, choose.add_arguments, choose.run),
    "attribute": Subcommand(attribute.HELP, attribute.add_arguments, attribute.run),
    "domains": Subcommand(domains.HELP, domains.add_arguments, domains.run),
    "report": Subcommand(report.HELP, report.add_arguments, report.run),
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, with exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {clean(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(
        prog="compare",
        allow_abbrev=False,
        description="Compare models, quantized or not, from the result files of lm-evaluation-harness.",
        epilog="Exit codes: 0 done, 1 wrong usage, 2 no usable result.",
    )
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=subcommand.help,
            description=subcommand.help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subcommand.add_arguments(subparser)
        subparser.set_defaults(run=subcommand.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `compare` and return its exit code: 0 done, 1 wrong usage, 2 no usable result.

    ``compare run`` also returns 3 where some models failed, and 130 after an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a label's characters
    arguments = build_parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except CompareError as error:
        say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # A reader such as `| head` has closed the pipe; without this, Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
