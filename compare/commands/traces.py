"""``compare traces``: let the original model answer prompts, and keep the token ids of its answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from compare.run.traces import TracesRequest, make_traces

HELP = "let the original model answer prompts, for the tasks own_answers and own_answers_greedy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare traces``."""
    parser.epilog = (
        'Then, for every model: lm_eval run … --tasks own_answers --metadata \'{"trace": "FILE"}\'. '
        "Exit codes: 0 done, 1 wrong usage, 2 no answers."
    )
    parser.add_argument("--model", required=True, help="a model of lm_eval that returns token ids, e.g. hf_quant")
    parser.add_argument(
        "--model_args", "--model-args", default="", metavar="A=B,…", help="its arguments, as in lm_eval"
    )
    parser.add_argument("--device", help="as in lm_eval")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the trace file, JSON")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON list of prompts (default: 24 of the package's own)"
    )
    parser.add_argument(
        "--max-tokens", type=_count, default=512, metavar="N", help="the most tokens of an answer (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0: greedy (default), which own_answers_greedy needs; others sample",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the samples (default: 1234)")
    parser.add_argument(
        "--no-chat-template", action="store_true", help="leave the prompts as they are, for a model without chat"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return make_traces(
        TracesRequest(
            model=arguments.model,
            model_args=arguments.model_args,
            output=arguments.output,
            device=arguments.device,
            prompts=arguments.prompts,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            chat_template=not arguments.no_chat_template,
        )
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:  # vLLM takes no higher one
        raise argparse.ArgumentTypeError("expected a number from 0 to 2")
    return value
