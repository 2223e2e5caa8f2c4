"""``compare attribute``: which matrices of a quantized model cost the divergence."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from compare.commands.common import check_picture_name
from compare.console import say
from compare.errors import CompareError
from compare.results.attribution import read_attribution

HELP = "which parts of a quantized model cost the divergence: quantizes one at a time, table and plot"
_MEASURING = ("quantized", "reference", "task", "metadata", "by", "limit", "dtype", "device", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE.json", help="file of the costs: read or, with --original, written"
    )
    measuring = parser.add_argument_group("measuring (in Transformers, with hf_quant)")
    measuring.add_argument("--original", metavar="DIR", help="unquantized checkpoint, of which the reference was saved")
    measuring.add_argument("--quantized", metavar="DIR", help="quantized checkpoint of the same model")
    measuring.add_argument("--reference", metavar="DIR", help="folder of the reference (save_reference=)")
    measuring.add_argument("--task", help="task of the reference's windows (default: wiki2_strided)")
    measuring.add_argument("--metadata", metavar="JSON", help="settings of the task, as in lm_eval run --metadata")
    measuring.add_argument("--by", choices=("matrix", "layer", "kind"), help="what is quantized at a time: each matrix "
                           "(default), a layer, or a kind of matrix in all layers")  # fmt: skip
    measuring.add_argument("--limit", type=int, metavar="N", help="the first N windows only")
    measuring.add_argument("--dtype", help="of the original and the decoded weights (default: the checkpoint's)")
    measuring.add_argument("--device", help="default: a GPU if there is one")
    measuring.add_argument("--batch-size", metavar="N", help="windows of a forward (default: 1)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of the table (default: 20)")
    parser.add_argument("--format", choices=("md", "csv"), default="md", help="Markdown (default), or all parts as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the costs into FILE.png, .svg or .pdf")
    parser.add_argument("--title", help="title of the picture")
    parser.add_argument("--log-y", action=argparse.BooleanOptionalAction, help="logarithmic axis of the costs")


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        check_picture_name("--plot", arguments.plot)
        if arguments.plot.suffix.lower() == ".html":
            raise CompareError(f"--plot {arguments.plot}: expected a name that ends in .png, .svg or .pdf")
    given = [f"--{name.replace('_', '-')}" for name in _MEASURING if getattr(arguments, name) is not None]
    if arguments.original is None and given:
        raise CompareError(f"{given[0]} is about measuring, which needs --original DIR too")
    if arguments.original is not None:
        _measure(arguments)
    attribution = read_attribution(arguments.file)
    from compare.table import attribution as table

    text = table.render_csv(attribution) if arguments.format == "csv" else table.render_markdown(
        attribution, arguments.top
    )  # fmt: skip
    sys.stdout.write(text)
    if arguments.plot is not None:
        from compare.files import write_output
        from compare.plot import figure
        from compare.plot.kind import PlotSettings
        from compare.plot.pictures.attribution import AttributionPlot

        settings = PlotSettings(arguments.title, log_y=arguments.log_y)
        picture = AttributionPlot(attribution, settings)
        kind = arguments.plot.suffix[1:].lower()
        write_output(arguments.plot, figure.render(picture, settings, kind, say))
        say(f"wrote {arguments.plot} ({len(picture.rows)} parts)")
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    """Measures in a process of its own. Raises CompareError if it fails; its own message is on stderr by then."""
    for name in ("quantized", "reference"):
        if getattr(arguments, name) is None:
            raise CompareError(f"--original needs --{name} DIR too")
    command = [sys.executable, "-m", "lmeval_ext.attribution", "--original", arguments.original]
    for name in _MEASURING:
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    code = subprocess.run([*command, "-o", str(arguments.file)], check=False).returncode
    if code:
        raise CompareError(f"nothing was measured (exit code {code}); the line above says why")
