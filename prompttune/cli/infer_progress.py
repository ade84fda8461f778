"""Progress and final lines of ``prompttune infer``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from prompttune.cli.engine_options import make_table
from prompttune.evaluation.result import percent

if TYPE_CHECKING:
    from prompttune.evaluation import TaskEvaluation
    from prompttune.serve.infer.job import InferSummary
    from prompttune.serve.infer.row_log import RunProgress
    from prompttune.serve.infer.running import Prepared

LINE_S = 30.0
"""Seconds between two lines if standard error is not a terminal with a bar."""
CHECK_S = 0.1
"""Seconds between two updates of the bar while inputs are compared, which happens by the thousand."""


class InferDisplay:
    """A bar on a terminal, or a line now and then if standard error is a file, such as a scheduler's log."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s, {task.fields[errors]} errors"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._checked = 0.0
        self._task = self._bar.add_task("opening", total=None, speed=0.0, errors=0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def check(self, done: int, total: int) -> None:
        """Show how much of an earlier run has been compared, in any unit."""
        if done == total or time.monotonic() - self._checked > CHECK_S:
            self._checked = time.monotonic()
            self._bar.update(self._task, description="comparing inputs", total=total, completed=done)

    def begin(self, before: RunProgress, total: int | None) -> None:
        """Start the display; ``before`` is the progress of earlier runs of the job."""
        self._before, self._total = before.inputs, total
        self._started = self._told = time.monotonic()
        self._bar.update(self._task, description="classifying", total=total, completed=before.inputs)

    def advance(self, progress: RunProgress) -> None:
        """Show that another chunk is written."""
        now = time.monotonic()
        speed = (progress.inputs - self._before) / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=progress.inputs, speed=speed, errors=progress.errors)
        if not self._console.is_terminal and now - self._told >= LINE_S:
            self._told = now
            of_all = "" if self._total is None else f" of {self._total}"
            left = "" if self._total is None else f", {(self._total - progress.inputs) / speed:.0f} s left"
            click.echo(
                f"{progress.inputs}{of_all} images, {speed:.1f} images/s, {progress.errors} errors{left}", err=True
            )


def in_words(summary: InferSummary, ready: Prepared, outputs: Sequence[str]) -> str:
    """One line about a job that has run."""
    before, tasks = ready.before.inputs, ready.tasks
    new = summary.inputs - before
    parts = [f"{summary.inputs} images" if not before else f"{summary.inputs} images, {new} of them in this run"]
    if tasks:
        parts.append(f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}")
    parts.append(f"{summary.errors} could not be read")
    parts += [f"{count} {name.replace('_', ' ')}" for name, count in summary.counts.items() if count]
    if summary.latency is not None:
        parts.append("latency p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms".format(**summary.latency))
    parts.append(f"{summary.seconds:.1f} s ({summary.images_per_s:.1f} images/s)")
    files = [output for output in outputs if not output.endswith("-")]
    line = ", ".join(parts) + (f"; wrote {', '.join(files)}" if files else "")
    if summary.finished:
        return line
    return f"{line}; interrupted, run again with --resume" if ready.resumable else f"{line}; interrupted"


def evaluation_table(evaluations: Mapping[str, TaskEvaluation]) -> None:
    """Print accuracy and calibration of each task on standard error, since standard output may hold rows."""
    table = make_table(("task",), ("images", "top-1", "top-5", "balanced", "macro F1", "loss", "ECE", "not scored"))
    for task, one in evaluations.items():
        found = one.evaluation
        out = str(one.errors + one.unlabelled + (one.unknown if found is None else 0))
        if found is None:
            table.add_row(task, "0", *["-"] * 6, out)
            continue
        loss = "-" if found.loss is None else f"{found.loss:.4f}"
        shares = (found.top1, found.top5, found.balanced_accuracy, found.macro_f1)
        table.add_row(task, str(found.n), *map(percent, shares), loss, percent(found.ece), out)
    Console(stderr=True).print(table)
    for task, one in evaluations.items():
        if one.unknown:
            named = ", ".join(one.unknown_labels)
            words = f"{one.unknown} true labels are not among its classes, such as {named}; {one.told_of_unknown}"
            click.echo(f"{task}: {words}", err=True)
