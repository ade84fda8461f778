"""A benchmark from its plan to its files: rows of the runs, the table, latencies, a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.benchmark.latency import MethodLatency, measure
from prompttune.benchmark.plan import RECORD_FILE, RunSpec, make_plan
from prompttune.benchmark.recipe import Recipe
from prompttune.benchmark.runner import Listener, RunResult, execute
from prompttune.benchmark.search import Choices, Decision, decided_so_far, make_search, run_search
from prompttune.benchmark.summary import ResultsTable, summarise
from prompttune.benchmark.tables import markdown
from prompttune.errors import UsageError, describe_failure
from prompttune.files import write_json, write_text
from prompttune.spreadsheets import write_table

RESULTS, TABLE, SUMMARY, LATENCY, PLOT = "results.csv", "summary.md", "summary.json", "latency.csv", "accuracy.png"


@dataclass(frozen=True)
class RunFailure:
    """A failed run, or the runs of a method on a task whose settings could not be chosen."""

    run: str
    error: str


@dataclass(frozen=True)
class BenchmarkReport:
    """Result of a benchmark."""

    summary: ResultsTable
    outcomes: Sequence[RunResult]
    latencies: Sequence[MethodLatency] = ()
    failures: Sequence[RunFailure] = ()
    notes: Sequence[str] = ()
    """Remarks for the user besides the failures, one line each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self.summary),
            "latencies": [dataclasses.asdict(one) for one in self.latencies],
            "runs": _rows(self.outcomes),
            "failures": [dataclasses.asdict(one) for one in self.failures],
        }


@dataclass(frozen=True)
class Benchmark:
    """The methods to compare, the tasks, and the output."""

    recipe: Recipe
    labels: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int]
    overrides: Mapping[str, Any]
    """Settings that replace the recipe's."""
    output: Path

    def search(self) -> list[RunSpec]:
        """The runs that choose settings."""
        return make_search(self.recipe, self.labels, self.tasks, self.overrides)

    def plan(self, choices: Choices) -> list[RunSpec]:
        """The runs that are reported."""
        return make_plan(self.recipe, self.labels, self.tasks, self.seeds, self.overrides, choices)

    @property
    def device(self) -> str:
        """Device of all runs."""
        return self.plan({})[0].config(self.output).device


def run_benchmark(job: Benchmark, jobs: int, listener: Listener, *, latency: bool = True) -> BenchmarkReport:
    """Choose settings if the recipe requires it, train every run, and write the files of both to the output.

    See :func:`prompttune.benchmark.search.run_search` and :func:`prompttune.benchmark.runner.execute`. If a setting
    could not be tried, or none can be chosen, the runs that depend on it are left out, and the report says so.

    Raises:
        UsageError: a setting, a backbone's name or a device is wrong; no run has been trained.
        BackboneError: weights are missing or do not fit; no run has been trained.
    """
    search = job.search()
    # errors in the reported runs are raised before the search trains for days
    _check_backbones([*search, *job.plan({})], job.output)
    decision, tried = run_search(search, job.output, jobs, listener)
    plan = job.plan(decision.choices)
    ready = [spec for spec in plan if not decision.is_open(spec)]

    def write() -> None:
        _write_rows(job, plan, [row for spec in ready if (row := spec.record(job.output)) is not None])

    outcomes = execute(ready, job.output, jobs, listener, write)
    failures = [*_failures(tried), *_without_choice(decision), *_failures(outcomes)]
    return _conclude(job, plan, outcomes, latency, failures=failures)


def _check_backbones(specs: Sequence[RunSpec], output: Path) -> None:
    """Load each backbone of the remaining runs once: a wrong name, file or device would make each of them fail."""
    from prompttune.backbones import load_backbone
    from prompttune.training.scoring import resolve_device

    configs = [spec.config(output) for spec in specs if not (spec.folder(output) / RECORD_FILE).exists()]
    for device in dict.fromkeys(config.device for config in configs):
        resolve_device(device)
    for key in dict.fromkeys((config.backbone, config.image_size, config.weights) for config in configs):
        load_backbone(*key)


def _failures(outcomes: Sequence[RunResult]) -> list[RunFailure]:
    return [RunFailure(one.spec.name, one.error) for one in outcomes if one.error is not None and not one.diverged]


def _without_choice(decision: Decision) -> list[RunFailure]:
    waiting = dict.fromkeys(decision.waiting, "left out: a setting of its search could not be tried")
    reasons = {**waiting, **{pair: f"left out: {why}" for pair, why in decision.barren.items()}}
    return [RunFailure("/".join(pair), why) for pair, why in reasons.items()]


def report_finished(job: Benchmark, *, latency: bool = True) -> BenchmarkReport:
    """Write the files for the runs that are finished so far, without training.

    Raises:
        UsageError: all runs are unfinished, or settings are still to be chosen.
    """
    decision = decided_so_far(job.search(), job.output)
    plan = job.plan(decision.choices)
    rows = {spec: spec.record(job.output) for spec in plan if not decision.is_open(spec)}
    outcomes = [RunResult(spec, row, kept=True) for spec, row in rows.items() if row is not None]
    if not outcomes and decision.waiting:
        raise UsageError(f"settings are still to be chosen in {job.output}: there is nothing to tabulate yet")
    if not outcomes:
        raise UsageError(f"no run of this plan is finished in {job.output}; --dry-run lists them")
    _write_rows(job, plan, _rows(outcomes))
    notes = [f"{task}/{label}: {why}" for (task, label), why in decision.barren.items()]
    return _conclude(job, plan, outcomes, latency, notes=notes)


def _conclude(
    job: Benchmark,
    plan: Sequence[RunSpec],
    outcomes: Sequence[RunResult],
    latency: bool,
    failures: Sequence[RunFailure] = (),
    notes: Sequence[str] = (),
) -> BenchmarkReport:
    """Write summary and plot, then again with the latencies once they are measured; the rows are already written."""
    report = BenchmarkReport(_tabulate(job, plan, _rows(outcomes)), outcomes, failures=failures, notes=notes)
    _write(report, job.output)
    if not latency:
        return report
    try:
        report = dataclasses.replace(report, latencies=_latencies(outcomes))
    except Exception as problem:  # an additional figure must not lose days of training
        return dataclasses.replace(report, notes=[*notes, f"latencies are missing: {describe_failure(problem)}"])
    _write(report, job.output)
    return report


def _rows(outcomes: Sequence[RunResult]) -> list[dict[str, Any]]:
    return [outcome.row for outcome in outcomes if outcome.row is not None]


def _write_rows(job: Benchmark, plan: Sequence[RunSpec], rows: Sequence[dict[str, Any]]) -> None:
    write_table(job.output / RESULTS, rows)
    if rows:
        write_text(job.output / TABLE, markdown(_tabulate(job, plan, rows)))


def _tabulate(job: Benchmark, plan: Sequence[RunSpec], rows: Sequence[dict[str, Any]]) -> ResultsTable:
    config = plan[0].config(Path())
    words = [f"{job.recipe.protocol}: {job.recipe.title}", config.backbone]
    if config.image_size is not None:
        words[-1] += f" at {config.image_size} pixels"
    if len(job.tasks) < len(job.recipe.tasks):
        words.append(f"{len(job.tasks)} of {len(job.recipe.tasks)} tasks")
    tasks = {task: job.recipe.tasks[task].group for task in job.tasks}
    return summarise(", ".join(words), tasks, job.labels, rows, len(plan) - len(rows))


def _latencies(outcomes: Sequence[RunResult]) -> list[MethodLatency]:
    """MethodLatency of every label with a figure, on the plan's backbone, with the settings of its first run."""
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


def _write(report: BenchmarkReport, output: Path) -> None:
    from prompttune.benchmark.plots import plot_summary

    write_table(output / LATENCY, [dataclasses.asdict(one) for one in report.latencies])
    write_json(output / SUMMARY, report.to_dict())
    plot_summary(output / PLOT, report.summary, report.latencies)
