"""The report's section on answers: which of them changed against the full-precision model, task by task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from compare.comparison.chosen_metric import ChosenMetric
from compare.comparison.comparison import Comparison
from compare.plot.kind import PlotSettings
from compare.plot.pictures.flips import FlipBars
from compare.plot.series import drawing_of
from compare.report import content
from compare.report.pictures import PageFigure, palette, still

Say = Callable[[str], None]

MEANING = (
    (
        "Flips",
        "Answers that turned from right to wrong, or from wrong to right. Accuracies of two models can be equal while "
        "many answers differ: the two kinds of flips cancel in the accuracy, and not for a user.",
    ),
    ("Other answer", "Another answer was chosen, right or wrong: also one wrong answer in place of another."),
    (
        "Equivalent",
        "Two one-sided tests show that the accuracies differ by less than the margin, either way. Without --margin "
        "nothing is said of it: two models that are not told apart may still differ.",
    ),
)


@dataclass
class AnswerSection:
    """One task. colours: those of its picture (`pictures.palette`)."""

    picture: PageFigure
    tables: list[content.PageTable]
    colours: dict[str, str] = field(default_factory=dict)


def sections(
    comparisons: Sequence[Comparison], tabled: Collection[ChosenMetric], first: int, note: Say
) -> list[AnswerSection]:
    """A section per comparison, whose pairs have flips; pictures are numbered from `first`.

    tabled: metrics whose pairs the page's main tables show already.
    """
    result = []
    for number, comparison in enumerate(comparisons, first):
        picture = FlipBars(comparison, PlotSettings())
        drawing = drawing_of([point for point, _ in picture.shown])
        tables = [] if comparison.metric in tabled else content.tables(comparison)
        result.append(AnswerSection(still(picture, drawing, PlotSettings(), number, note), tables, palette(drawing)))
    return result
