"""A benchmark from its plan to its files: rows of the runs, the table, latencies, a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.files import write_json, write_text
from prompttune.protocols.latency import Latency, measure
from prompttune.protocols.plan import RunSpec, make_plan
from prompttune.protocols.recipe import Recipe
from prompttune.protocols.runner import Listener, Outcome, Pace, execute
from prompttune.protocols.search import Choices, finished_choices, make_search, run_search
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
            "runs": _rows(self.outcomes),
            "failures": [{"run": outcome.spec.name, "error": outcome.error} for outcome in self.failures],
        }


@dataclass(frozen=True)
class Job:
    """What to compare, on what, and where it goes."""

    recipe: Recipe
    labels: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int]
    overrides: Mapping[str, Any]
    """Settings that go before the recipe's."""
    output: Path

    def search(self) -> list[RunSpec]:
        """Runs that choose settings."""
        return make_search(self.recipe, self.labels, self.tasks, self.overrides)

    def plan(self, choices: Choices) -> list[RunSpec]:
        """Runs that are reported."""
        return make_plan(self.recipe, self.labels, self.tasks, self.seeds, self.overrides, choices)

    @property
    def device(self) -> str:
        """Of all runs."""
        return self.plan({})[0].config(self.output).device


def run_benchmark(job: Job, jobs: int, listener: Listener, *, latency: bool = True) -> Report:
    """Choose settings where the recipe says so, train every run, and write the files of both to the output.

    See :func:`prompttune.protocols.search.run_search` and :func:`prompttune.protocols.runner.execute`.
    """
    search = job.search()
    job.plan({})  # what is wrong with the reported runs is said before the search trains for days
    plan = job.plan(run_search(search, job.output, jobs, listener))
    outcomes = execute(plan, job.output, jobs, _Writer(job, plan, listener))
    return _conclude(job, plan, outcomes, latency)


def report_finished(job: Job, *, latency: bool = True) -> Report:
    """Write the files over the runs that are finished so far, and train nothing.

    Raises:
        UsageError: no run is finished, or settings are still to be chosen.
    """
    choices = finished_choices(job.search(), job.output)
    if choices is None:
        raise UsageError(f"settings are still to be chosen in {job.output}: there is nothing to tabulate yet")
    plan = job.plan(choices)
    outcomes = [Outcome(spec, row, kept=True) for spec in plan if (row := spec.record(job.output)) is not None]
    if not outcomes:
        raise UsageError(f"no run of this plan is finished in {job.output}; --dry-run lists them")
    _write_rows(job, plan, _rows(outcomes))
    return _conclude(job, plan, outcomes, latency)


def _conclude(job: Job, plan: Sequence[RunSpec], outcomes: Sequence[Outcome], latency: bool) -> Report:
    """Summary, latencies and plot; the rows are written already."""
    latencies = _latencies(outcomes) if latency else []
    report = Report(_tabulate(job, plan, _rows(outcomes)), outcomes, latencies)
    _write(report, job.output)
    return report


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [outcome.row for outcome in outcomes if outcome.row is not None]


class _Writer:
    """Passes the news on and brings ``results.csv`` and the table up to date after every run."""

    def __init__(self, job: Job, plan: Sequence[RunSpec], listener: Listener) -> None:
        self.job, self.plan, self.listener = job, plan, listener

    def begin(self, pace: Pace) -> None:
        self.listener.begin(pace)
        self._write()

    def update(self, pace: Pace) -> None:
        self.listener.update(pace)

    def ended(self, outcome: Outcome, pace: Pace) -> None:
        self.listener.ended(outcome, pace)
        self._write()

    def _write(self) -> None:
        rows = [row for spec in self.plan if (row := spec.record(self.job.output)) is not None]
        _write_rows(self.job, self.plan, rows)


def _write_rows(job: Job, plan: Sequence[RunSpec], rows: Sequence[dict[str, Any]]) -> None:
    write_rows(job.output / RESULTS, rows)
    if rows:
        write_text(job.output / TABLE, markdown(_tabulate(job, plan, rows)))


def _tabulate(job: Job, plan: Sequence[RunSpec], rows: Sequence[dict[str, Any]]) -> Summary:
    config = plan[0].config(Path())
    words = [f"{job.recipe.protocol}: {job.recipe.title}", config.backbone]
    if config.image_size is not None:
        words[-1] += f" at {config.image_size} pixels"
    if len(job.tasks) < len(job.recipe.tasks):
        words.append(f"{len(job.tasks)} of {len(job.recipe.tasks)} tasks")
    tasks = {task: job.recipe.tasks[task].group for task in job.tasks}
    return summarise(", ".join(words), tasks, job.labels, rows, len(plan) - len(rows))


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
