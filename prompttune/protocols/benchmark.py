"""A benchmark from its plan to its files: rows of the runs, the table, latencies, a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.files import write_json, write_text
from prompttune.protocols.latency import Latency, measure
from prompttune.protocols.plan import RunSpec
from prompttune.protocols.recipe import Recipe
from prompttune.protocols.runner import Listener, Outcome, execute
from prompttune.protocols.summary import Summary, summarise
from prompttune.protocols.tables import markdown, write_rows

RESULTS, TABLE, SUMMARY, LATENCY, PLOT = "results.csv", "summary.md", "summary.json", "latency.csv", "accuracy.png"


@dataclass(frozen=True)
class Report:
    """What a benchmark came to."""

    summary: Summary
    outcomes: Sequence[Outcome]
    latencies: Sequence[Latency]

    @property
    def failures(self) -> list[Outcome]:
        """Runs that failed."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **self.summary.to_dict(),
            "latencies": [dataclasses.asdict(one) for one in self.latencies],
            "runs": [outcome.row for outcome in self.outcomes if outcome.row is not None],
            "failures": [{"run": outcome.spec.name, "error": outcome.error} for outcome in self.failures],
        }


def run_benchmark(
    recipe: Recipe, plan: Sequence[RunSpec], output: Path, jobs: int, listener: Listener, *, latency: bool = True
) -> Report:
    """Carry out a plan and write its files to ``output``; see :func:`prompttune.protocols.runner.execute`."""
    writer = _Writer(recipe, plan, output, listener)
    outcomes = execute(plan, output, jobs, writer)
    latencies = _latencies(outcomes) if latency else []
    report = Report(_summary(recipe, plan, outcomes), outcomes, latencies)
    _write(report, output)
    return report


class _Writer:
    """Passes the news on and brings ``results.csv`` and the table up to date after every run."""

    def __init__(self, recipe: Recipe, plan: Sequence[RunSpec], output: Path, listener: Listener) -> None:
        self.recipe, self.plan, self.output, self.listener = recipe, plan, output, listener

    def begin(self, pace: Any) -> None:
        self.listener.begin(pace)
        self._write()

    def update(self, pace: Any) -> None:
        self.listener.update(pace)

    def ended(self, outcome: Outcome, pace: Any) -> None:
        self.listener.ended(outcome, pace)
        self._write()

    def _write(self) -> None:
        rows = [row for spec in self.plan if (row := spec.record(self.output)) is not None]
        write_rows(self.output / RESULTS, rows)
        if rows:
            write_text(self.output / TABLE, markdown(_tabulate(self.recipe, self.plan, rows)))


def _summary(recipe: Recipe, plan: Sequence[RunSpec], outcomes: Sequence[Outcome]) -> Summary:
    return _tabulate(recipe, plan, [outcome.row for outcome in outcomes if outcome.row is not None])


def _tabulate(recipe: Recipe, plan: Sequence[RunSpec], rows: Sequence[dict[str, Any]]) -> Summary:
    tasks = {spec.task: spec.group for spec in plan}
    labels = list(dict.fromkeys(spec.label for spec in plan))
    config = plan[0].config(Path())
    size = "" if config.image_size is None else f" at {config.image_size} pixels"
    return summarise(
        f"{recipe.protocol}: {recipe.title}, {config.backbone}{size}", tasks, labels, rows, len(plan) - len(rows)
    )


def _latencies(outcomes: Sequence[Outcome]) -> list[Latency]:
    """Of every label that has a figure, on the backbone of the plan, with the settings of its first run."""
    from prompttune.backbones import load_backbone

    specs: dict[str, RunSpec] = {}
    for outcome in outcomes:
        if outcome.row is not None:
            specs.setdefault(outcome.spec.label, outcome.spec)
    if not specs:
        return []
    config = next(iter(specs.values())).config(Path())
    backbone = load_backbone(config.backbone, config.image_size, config.weights)
    classes = max(outcome.row["classes"] for outcome in outcomes if outcome.row is not None)
    return measure(specs, backbone, config.device, classes)


def _write(report: Report, output: Path) -> None:
    from prompttune.protocols.plots import plot_summary

    write_rows(output / LATENCY, [dataclasses.asdict(one) for one in report.latencies])
    write_json(output / SUMMARY, report.to_dict())
    plot_summary(output / PLOT, report.summary, report.latencies)
