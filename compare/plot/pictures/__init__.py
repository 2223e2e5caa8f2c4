"""The kinds of picture, one class in one file each.

`scatter` and `panels` draw one metric or several against size, `attribution` the costs of a model's parts. The kinds of
`DISTRIBUTIONS` show how a metric varies over the tokens: `spread` draws boxes, `histogram` step lines, `by_position`
lines over the position in the window. A new one is a file NAME.py here, whose `KIND` is its class, and a row below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compare.plot.kind import DistributionKind

# Flag of `compare plot` with its help; here, since the files import matplotlib, which is slow to load for a parser.
DISTRIBUTIONS = {
    "spread": "a box per model: median, quartiles, 5, 95 and 99 % of the tokens' KL divergence, size across",
    "histogram": "a line per model: how many tokens have which KL divergence",
    "by_position": "a line per model: a metric over the position in the window, with 95 % intervals; --metric takes "
    "kld (default), top1_agreement, ppl_ratio, token_perplexity (default without a reference)",
}


def flag_of(name: str) -> str:
    """The flag of a row of `DISTRIBUTIONS`: ``--by-position``."""
    return f"--{name.replace('_', '-')}"


def distribution_kind(name: str) -> type[DistributionKind]:
    """The class of a row of `DISTRIBUTIONS`. Raises KeyError for another name."""
    if name not in DISTRIBUTIONS:
        raise KeyError(name)
    kind: type[DistributionKind] = import_module(f"{__name__}.{name}").KIND
    return kind
