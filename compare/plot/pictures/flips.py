"""Which answers changed: a bar per model, right to wrong to the left, wrong to right to the right."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from compare.comparison.comparison import Comparison
from compare.comparison.flips import Flips
from compare.comparison.point import Point
from compare.families import family_style
from compare.plot import style
from compare.plot.axes import frame
from compare.plot.captions import Texts, subtitle
from compare.plot.header import draw_texts
from compare.plot.kind import PlotKind, PlotSettings, Say
from compare.text import clean, shorten

_MOST, _ROW, _REST, _LABEL = 40, 0.36, 2.3, 34  # models; inches per model and for all else; characters


class FlipBars(PlotKind):
    """The flips of a comparison whose pairs were formed. shown: the models with their flips, in the table's order."""

    def __init__(self, comparison: Comparison, settings: PlotSettings) -> None:
        assert comparison.pairs is not None
        self.comparison, self.baseline = comparison, comparison.pairs.label
        found = [(point, comparison.pairs.pair(point).flips) for point in comparison.points]
        every = [(point, flips) for point, flips in found if flips is not None]
        self.shown: list[tuple[Point, Flips]] = every[:_MOST]
        self.left_out = [f"not drawn, there is room for {_MOST} models: {p.record.label}" for p, _ in every[_MOST:]]
        self.title = clean(settings.title) if settings.title else f"Answers that turned, against {self.baseline}"
        self.size = (style.WIDTH, _REST + _ROW * max(2, len(self.shown)))
        self.description = f"{self.title}. " + "; ".join(
            f"{p.record.label}: {f.right_to_wrong.count} right to wrong, {f.wrong_to_right.count} wrong to right"
            for p, f in self.shown
        )

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        for message in self.left_out:
            say(message)
        theme = settings.theme
        questions = max(flips.both.total for _, flips in self.shown)
        caption = [
            f"Bars: share of {questions:,} questions with its 95 % interval. Diamond: their difference, the change of "
            "the accuracy."
        ]
        layout = draw_texts(figure, Texts(self.title, subtitle(self.comparison), caption), [], theme)
        left, bottom, width, height = layout.axes_box
        labels = [shorten(point.record.label, _LABEL) for point, _ in self.shown]
        room = min(0.36, 0.0078 * max(map(len, labels)) + 0.02)
        ax: Any = figure.add_axes((left + room, bottom, width - room, height))
        frame(ax, "← right to wrong      questions (%)      wrong to right →", "")
        ax.grid(False, axis="y")
        for row, (point, flips) in enumerate(self.shown):
            family = family_style(point.record.quantization.family)
            colour = family.dark if theme.dark else family.light
            for share, sign, alpha in ((flips.right_to_wrong, -1, 0.95), (flips.wrong_to_right, 1, 0.5)):
                ax.barh(row, sign * share.value * 100, height=0.6, color=colour, alpha=alpha, zorder=2)
                if share.low is not None and share.high is not None:
                    ends = [sign * share.low * 100, sign * share.high * 100]
                    ax.plot(ends, [row, row], color=theme.soft, linewidth=1.4, zorder=3)
            net = (flips.wrong_to_right.value - flips.right_to_wrong.value) * 100
            ax.plot([net], [row], linestyle="none", marker="D", markersize=6.5, markerfacecolor=theme.ink,
                    markeredgecolor=theme.ground, markeredgewidth=0.9, zorder=4)  # fmt: skip
        ax.axvline(0, color=theme.ink, linewidth=1.0, zorder=3)
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        most = max(abs(end) for end in ax.get_xlim())
        ax.set_xlim(-most, most)
        ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")


KIND = FlipBars
