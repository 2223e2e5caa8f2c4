"""The command line: a table of subcommands, each a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from compare.commands import plot, report, run, table
from compare.errors import USAGE, CompareError
from compare.text import clean


class Subcommand(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


SUBCOMMANDS: dict[str, Subcommand] = {
    "run": Subcommand(run.HELP, run.add_arguments, run.run),
    "table": Subcommand(table.HELP, table.add_arguments, table.run),
    "plot": Subcommand(plot.HELP, plot.add_arguments, plot.run),
    "report": Subcommand(report.HELP, report.add_arguments, report.run),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {clean(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
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
    """Run `compare` and return its exit code: 0 done, 1 wrong usage, 2 nothing usable."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a label must not stop us
    arguments = build_parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except CompareError as error:
        print(f"compare: {clean(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
