"""``compare run``: evaluate the models of spec files that have no result yet, and draw the plot."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from compare.commands.common import check_picture_name
from compare.comparison.comparison import Options
from compare.errors import CompareError
from compare.run.request import RunRequest
from compare.write import PlotRequest, has_display

HELP = "evaluate the models of spec files, each in its own process, and draw the plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare run``, grouped as its ``--help`` shows them."""
    parser.epilog = (
        "The short flags are those of ExLlamaV3's compare_q.py; docs/compare_run.md leads from there to here. "
        "Exit codes: 0 all models have a result, 1 wrong usage, 2 no result at all, 3 some models failed."
    )
    spec = parser.add_argument_group("what to run")
    spec.add_argument(
        "-d", "--data", "--dataspec", dest="data", type=Path, metavar="FILE", help="data spec, JSON or YAML"
    )
    spec.add_argument(
        "-m", "--models", "--modelspec", dest="models", nargs="+", required=True, metavar="FILE",
        help="model specs, JSON or YAML; names and globs",
    )  # fmt: skip
    spec.add_argument("-mask", "--mask", metavar='"A;B"', help="only models whose label contains one of these strings")
    spec.add_argument(
        "--tasks", type=lambda text: text.split(","), metavar="A,B", help="harness tasks, instead of the specs'"
    )
    spec.add_argument("--limit", type=_limit, metavar="N", help="first N windows or samples of each task (a test run)")
    spec.add_argument(
        "-kld",
        "--kld",
        action="store_true",
        help="measure the KL divergence from the reference among the models, and plot it",
    )
    spec.add_argument(
        "-lf", "--logits-file", "--logits_file", type=Path, metavar="FOLDER",
        help="where the reference is stored (default: RESULTS/reference/); a reference already stored there is used",
    )  # fmt: skip
    spec.add_argument(
        "--log-samples", action="store_true", help="keep each window's or sample's figures with the results"
    )
    plot = parser.add_argument_group("the plot")
    plot.add_argument("-p", "--plot", action="store_true", help="draw the plot in a window (or see -pf)")
    plot.add_argument("-pf", "--plot-file", "--plot_file", type=Path, metavar="FILE", help="write the plot to FILE")
    plot.add_argument("-v", "--vram", action="store_true", help="VRAM of decoder and head on the x axis")
    plot.add_argument("-t", "--title", help="heading of the plot")
    plot.add_argument("-mx", "--max-x", "--max_x", type=float, metavar="X", help="leave out points beyond X")
    plot.add_argument("-my", "--max-y", "--max_y", type=float, metavar="Y", help="leave out points beyond Y")
    plot.add_argument("-dark", "--dark", action="store_true", help="light on dark")
    how = parser.add_argument_group("how to run")
    how.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where results are kept (default: results)"
    )
    how.add_argument(
        "-cc", "--clear-cache", "--clear_cache", action="store_true", help="remove the selected models' results first"
    )
    how.add_argument("--dry-run", action="store_true", help="show what would be run, and with which commands")
    how.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="number of models at a time, one GPU each (default: 1)"
    )
    how.add_argument(
        "--continue-on-error",
        action="store_true",
        help="leave out invalid entries instead of refusing the run, and exit with 0 if any model has a result",
    )
    how.add_argument(
        "--launcher", choices=("local", "ray"), default="local", help="where the processes run (default: local)"
    )
    how.add_argument(
        "--ray-address", metavar="ADDRESS", help="the Ray cluster (default: RAY_ADDRESS, or one on this machine)"
    )
    how.add_argument(
        "--gpu-gb", type=float, metavar="GB", help="memory of one GPU of the cluster; tells how many a model needs"
    )
    how.add_argument(
        "--harness",
        type=_command,
        metavar="COMMAND",
        help="command that is the harness' CLI (default: python -m lm_eval, with this Python)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    request = request_of(arguments)
    from compare.run.main import run_command  # imports pydantic, which `compare --help` does not need

    return run_command(request)


def request_of(arguments: argparse.Namespace) -> RunRequest:
    """The typed request of the parsed arguments. Raises CompareError where the plot cannot be written as asked."""
    folder: Path | None = arguments.logits_file
    return RunRequest(
        models=tuple(arguments.models),
        data=arguments.data,
        tasks=tuple(arguments.tasks or ()),
        limit=arguments.limit,
        log_samples=arguments.log_samples,
        mask=arguments.mask,
        kld=arguments.kld,
        reference_folder=None if folder is None else folder.expanduser().absolute(),
        results=arguments.results,
        clear_cache=arguments.clear_cache,
        dry_run=arguments.dry_run,
        jobs=arguments.jobs,
        continue_on_error=arguments.continue_on_error,
        launcher=arguments.launcher,
        ray_address=arguments.ray_address,
        gpu_gb=arguments.gpu_gb,
        harness=arguments.harness,
        plot=_plot_request(arguments),
        plot_options=Options(
            metrics=("kld",) if arguments.kld else (),
            axis="vram" if arguments.vram else "bpw",
            max_x=arguments.max_x,
            max_y=arguments.max_y,
        ),
    )


def _plot_request(arguments: argparse.Namespace) -> PlotRequest | None:
    """How and where to plot, checked before hours of evaluation; None for no plot."""
    file: Path | None = arguments.plot_file
    if file is None:
        if not arguments.plot:
            return None
        return PlotRequest(None if has_display() else arguments.results / "plot.png", arguments.title, arguments.dark)
    check_picture_name("-pf", file)
    if not file.parent.is_dir():
        raise CompareError(f"-pf {file}: there is no folder {file.parent}")
    return PlotRequest(file, arguments.title, arguments.dark)


def _limit(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1")
    return value


def _command(text: str) -> tuple[str, ...] | None:
    """The words of a command as a shell splits them; None for an empty text."""
    try:
        return tuple(shlex.split(text)) or None
    except ValueError as error:  # an open quote
        raise argparse.ArgumentTypeError(f"{text!r} is not a command ({error})") from error
