"""What a kind of picture is: one class in one file of `compare/plot/pictures/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compare.comparison.comparison import Comparison
from compare.metrics import KLD
from compare.plot import style
from compare.plot.distributions import Distributions
from compare.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlotSettings:
    """How the picture looks. log_y: a logarithmic y axis; None leaves it to the kind."""

    title: str | None = None
    dark: bool = False
    log_y: bool | None = None

    @property
    def theme(self) -> style.Theme:
        return style.DARK if self.dark else style.LIGHT


class PlotKind(ABC):
    """A picture of one or more comparisons. size: width and height in inches; title, description: for the file."""

    size: tuple[float, float] = (style.WIDTH, style.HEIGHT)
    title: str
    description: str

    @abstractmethod
    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        """Draws into an empty figure of this size; `say` receives what a reader of the picture should know."""


class DistributionKind(PlotKind):
    """A picture of how one metric varies over the tokens of each model: `compare plot --NAME`.

    metrics: those that this kind can draw; empty for all. excluded_flags: flags of `compare plot` that have no meaning
    for this kind.
    """

    metrics: ClassVar[tuple[str, ...]] = (KLD,)
    excluded_flags: ClassVar[tuple[str, ...]] = ("--pareto", "--budget", "--mean", "--subtasks")

    def __init__(self, comparison: Comparison, settings: PlotSettings) -> None:
        self.comparison = comparison
        self.shown = self.select(comparison)
        self.title = clean(settings.title) if settings.title else self.default_title()
        self.description = self.describe()

    @staticmethod
    @abstractmethod
    def select(comparison: Comparison) -> Distributions:
        """The models whose records hold what this kind draws, and why the others do not."""

    @abstractmethod
    def default_title(self) -> str:
        """The title where the user gives none."""

    @abstractmethod
    def describe(self) -> str:
        """The picture in words, for screen readers and search."""
