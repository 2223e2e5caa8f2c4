"""The report's section on domains: a row a model, a column a domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compare.comparison.comparison import Comparison
from compare.comparison.domains import PREFIX, Domains, ModelLosses
from compare.report.content import Cell, Head, PageRow, PageTable, colour_of_family, sort_key
from compare.table.domains import cell, sentences


@dataclass(frozen=True)
class DomainSection:
    """The table, and what it says together."""

    table: PageTable
    lines: list[str]


def section(comparisons: Sequence[Comparison]) -> DomainSection | None:
    """The losses of the first metric that at least two tasks ``domain_…`` share; None where there are none."""
    of_domains = [c for c in comparisons if c.metric.task.startswith(PREFIX) and c.metric.higher_is_better is not None]
    alike = [c for c in of_domains if c.metric.key == of_domains[0].metric.key]
    if len({c.metric.task for c in alike}) < 2:
        return None
    domains = Domains(list({c.metric.task: c for c in alike}.values()))
    unit = domains.scales[0].unit.strip()
    caption = f"Loss by {alike[0].metric.name}{f', {unit}' if unit and unit not in alike[0].metric.name else ''}"
    heads = [Head("Model"), *(Head(name, right=True, descending_first=True) for name in domains.names)]
    return DomainSection(PageTable(caption, heads, [_row(m) for m in domains.models]), sentences(domains))


def _row(model: ModelLosses) -> PageRow:
    cells = [Cell(cell(loss, i == model.worst), sort_key(loss.value)) for i, loss in enumerate(model.losses)]
    return PageRow(model.label, colour_of_family(model.family), cells)
