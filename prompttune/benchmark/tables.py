"""A summary as a table in the papers' form, for a terminal and as Markdown, and the runs as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prompttune.benchmark.summary import Cell, ResultsTable, TableLine

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"


def header(summary: ResultsTable) -> list[str]:
    """Names of the columns."""
    groups = [f"mean {group}" for group in summary.groups] if _has_groups(summary) else []
    last = ["mean of groups"] if _has_groups(summary) else []
    return ["method", *summary.tasks, *groups, "mean", *last, "seeds", "trained", "beside head", "% of backbone"]


def cells(summary: ResultsTable, line: TableLine) -> list[str]:
    """A line of the table: accuracies in percent, mean ± sample deviation over seeds."""
    groups = [percent(line.groups[group]) for group in summary.groups] if _has_groups(summary) else []
    last = [percent(line.mean_of_groups)] if _has_groups(summary) else []
    return [
        line.label,
        *(spelled(line.tasks[task]) for task in summary.tasks),
        *groups,
        percent(line.mean, line.deviation),
        *last,
        "-".join(str(count) for count in dict.fromkeys(line.seeds)),
        f"{line.trainable_parameters:,}",
        f"{line.parameters_beside_head:,}",
        f"{line.share_of_backbone:.3%}".removesuffix("%"),
    ]


def _has_groups(summary: ResultsTable) -> bool:
    return len(summary.groups) > 1


def spelled(cell: Cell | None) -> str:
    """An accuracy in percent."""
    return NOTHING if cell is None else percent(cell.mean, cell.deviation)


def percent(value: float | None, deviation: float | None = None) -> str:
    """A share in percent, with its deviation if there is one."""
    if value is None:
        return NOTHING
    return f"{value * 100:.1f}" if deviation is None else f"{value * 100:.1f} ± {deviation * 100:.1f}"


def rich_table(summary: ResultsTable) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title=summary.title, title_justify="left")
    for index, name in enumerate(header(summary)):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in summary.lines:
        table.add_row(*cells(summary, line))
    return table


def markdown(summary: ResultsTable) -> str:
    """The table as Markdown, with its headline above."""
    names = header(summary)
    lines = [
        f"# {summary.title}",
        "",
        "Top-1 in percent, mean ± sample standard deviation over the seeds.",
        "",
        _row(names),
        _row(["---"] + ["---:"] * (len(names) - 1)),
        *(_row(cells(summary, line)) for line in summary.lines),
    ]
    if summary.missing_runs:
        lines += ["", f"{summary.missing_runs} runs have no figure yet."]
    return "\n".join(lines) + "\n"


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', '/') for value in values)} |"
