"""The cost of each part: over the layers, one line a kind of matrix; bars where parts have no layers."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from compare.comparison.attribution import ranked
from compare.plot import style
from compare.plot.kind import PlotKind, PlotSettings, Say
from compare.results.attribution import Attribution
from compare.text import clean, shorten

# Distinct in light and dark, and for readers with a colour deficiency (Okabe and Ito 2008)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_MARKERS = "osD^vP*X"
_MOST_BARS = 40


class AttributionPlot(PlotKind):
    """`attribution` as a picture."""

    def __init__(self, attribution: Attribution, settings: PlotSettings) -> None:
        self.attribution = attribution
        self.rows = ranked(attribution)
        self.title = clean(settings.title) if settings.title else f"What {attribution.quantized} costs, part by part"
        most = self.rows[0] if self.rows else None
        self.description = self.title + (f"; most: {most.part.name}, {most.cost:.3g} nats" if most else "")

    def draw(self, figure: Figure, settings: PlotSettings, say: Say) -> None:
        a, theme = self.attribution, settings.theme
        figure.text(0.06, 0.945, shorten(self.title, 70), fontsize=style.TITLE, weight="bold")
        tokens = f", {a.scored_tokens:,} tokens" if a.scored_tokens else ""
        about = f"one {a.by} quantized at a time · {a.task}{tokens} · reference {a.reference}"
        figure.text(0.06, 0.9, shorten(about, 120), fontsize=style.SUBTITLE, color=theme.soft)
        layered = [row for row in self.rows if row.part.layer is not None]
        ax: Any
        if layered:
            ax = figure.add_axes((0.09, 0.11, 0.66, 0.73))
            self._lines(ax, settings)
        else:
            ax = figure.add_axes((0.3, 0.11, 0.65, 0.73))
            self._bars(ax, say)
        ax.grid(visible=True, axis="both", zorder=0)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.tick_params(labelsize=style.TICK)
        without = len(self.rows) - len(layered)
        if layered and without:
            say(f"not drawn, in no layer: {', '.join(r.part.name for r in self.rows if r.part.layer is None)}")

    def _lines(self, ax: Any, settings: PlotSettings) -> None:
        by_kind: dict[str, list[tuple[int, float, float]]] = {}
        for row in self.rows:
            if row.part.layer is not None:
                spot = (row.part.layer, row.cost, row.part.stderr or 0.0)
                by_kind.setdefault(row.part.kind or "whole layer", []).append(spot)
        for number, (kind, spots) in enumerate(sorted(by_kind.items(), key=lambda item: -sum(s[1] for s in item[1]))):
            layers, costs, errors = zip(*sorted(spots), strict=True)
            ax.errorbar(
                layers, costs, yerr=errors, color=_COLOURS[number % 8], marker=_MARKERS[number // 8 % 8],
                markersize=4.5, elinewidth=0.8, label=shorten(kind, 28), linewidth=1.6, zorder=3,
            )  # fmt: skip
        log = settings.log_y if settings.log_y is not None else False
        if log and all(row.cost > 0 for row in self.rows):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("Layer", fontsize=style.AXIS)
        ax.set_ylabel("KL divergence (nats) that this part alone adds", fontsize=style.AXIS)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=style.LABEL)

    def _bars(self, ax: Any, say: Say) -> None:
        shown = self.rows[:_MOST_BARS]
        if len(self.rows) > len(shown):
            say(f"drawn: the {len(shown)} most expensive of {len(self.rows)} parts")
        places = range(len(shown), 0, -1)
        errors = [row.part.stderr or 0.0 for row in shown]
        ax.barh(places, [row.cost for row in shown], xerr=errors, color=_COLOURS[0], height=0.7, zorder=3)
        ax.set_yticks(places, [shorten(row.part.name, 32) for row in shown])
        ax.set_xlabel("KL divergence (nats) that this part alone adds", fontsize=style.AXIS)
