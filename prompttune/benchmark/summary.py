"""From rows of runs to the papers' tables: mean and deviation over seeds, groups and tasks.

The fields have the names of ``summary.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """An accuracy over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation over the seeds, with n - 1; None for a single seed."""
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Mean and deviation of ``values``, which must not be empty."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class TableLine:
    """Results of a method or a variant."""

    label: str
    tasks: Mapping[str, Cell | None]
    """Accuracies by task; None if all runs of the task are unfinished."""
    groups: Mapping[str, float | None]
    """Mean over the tasks of each group; None if a task is missing."""
    mean: float | None
    """Mean over all tasks; None if a task is missing."""
    mean_of_groups: float | None
    """Mean of the groups' means, as is usual for VTAB."""
    deviation: float | None
    """Sample deviation over seeds of the mean over all tasks; None unless two seeds have every task."""
    trainable_parameters: int
    """Number of trained parameters including the head, averaged over the tasks, whose heads differ."""
    parameters_beside_head: int
    share_of_backbone: float
    """Number of trained parameters without the head, divided by that of the backbone."""

    @property
    def seeds(self) -> tuple[int, int]:
        """Smallest and largest number of seeds among the tasks with a figure."""
        counts = [cell.seeds for cell in self.tasks.values() if cell is not None]
        return min(counts), max(counts)


@dataclass(frozen=True)
class ResultsTable:
    """A benchmark's table."""

    title: str
    tasks: Mapping[str, str]
    """Group of each task, in the order of the columns."""
    lines: Sequence[TableLine]
    missing_runs: int = 0
    """Number of planned runs without a figure."""

    @property
    def groups(self) -> list[str]:
        """Groups in their order."""
        return list(dict.fromkeys(self.tasks.values()))


def summarise(
    title: str, tasks: Mapping[str, str], labels: Sequence[str], rows: Sequence[Mapping[str, Any]], missing: int = 0
) -> ResultsTable:
    """Tabulate rows of finished runs.

    Args:
        title: headline of the table.
        tasks: group of each task, in the order of the columns.
        labels: methods or variants, in the order of the lines; those without a row are left out.
        rows: rows of ``results.csv``.
        missing: number of runs without a row.
    """
    lines = [_line(label, tasks, [row for row in rows if row["label"] == label]) for label in labels]
    return ResultsTable(title, dict(tasks), [line for line in lines if line is not None], missing)


def _line(label: str, tasks: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> TableLine | None:
    by_task = {task: [row for row in rows if row["task"] == task] for task in tasks}
    rows = [row for found in by_task.values() for row in found]
    if not rows:
        return None
    cells = {task: Cell.of([row["accuracy"] for row in found]) if found else None for task, found in by_task.items()}
    means = {task: None if cell is None else cell.mean for task, cell in cells.items()}
    groups = {
        group: _mean([means[task] for task, of in tasks.items() if of == group])
        for group in dict.fromkeys(tasks.values())
    }
    ones = [next(iter(found)) for found in by_task.values() if found]
    return TableLine(
        label=label,
        tasks=cells,
        groups=groups,
        mean=_mean(list(means.values())),
        mean_of_groups=_mean(list(groups.values())),
        deviation=_deviation_of_mean(by_task),
        trainable_parameters=round(statistics.fmean(row["trainable_parameters"] for row in ones)),
        parameters_beside_head=round(statistics.fmean(row["parameters_beside_head"] for row in ones)),
        share_of_backbone=statistics.fmean(row["share_of_backbone"] for row in ones),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _deviation_of_mean(by_task: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """Sample deviation of the seeds' means over all tasks, for the seeds that have every task."""
    by_seed: dict[int, list[float]] = {}
    for found in by_task.values():
        for row in found:
            by_seed.setdefault(row["seed"], []).append(row["accuracy"])
    means = [statistics.fmean(values) for values in by_seed.values() if len(values) == len(by_task)]
    return statistics.stdev(means) if len(means) > 1 else None
