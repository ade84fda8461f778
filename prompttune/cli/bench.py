"""``prompttune bench``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from prompttune.cli.engine_options import make_table, weights_option, wide_console
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import UsageError
from prompttune.export.options import RuntimeOptions
from prompttune.settings import make

if TYPE_CHECKING:
    from prompttune.serve.bench import BenchReport


RUNTIME = ("device", "threads", "cuda_graph", "provider", "provider_cache", "runtime")


def _options() -> list[click.Parameter]:
    from prompttune.serve.bench.settings import BenchSettings

    return [*options_of(BenchSettings), *options_of(RuntimeOptions, only=RUNTIME)]


@click.command(cls=SectionedCommand, settings=_options)
@click.argument("engine", type=click.Path(path_type=Path))
@weights_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write the measurements to this CSV file.")
@click.pass_context
def bench(
    ctx: click.Context, /, engine: Path, weights: str | None, as_json: bool, csv_file: Path | None, **_settings: Any
) -> None:
    """Measure ENGINE: latency, throughput, memory, adding and switching tasks.

    Everything runs in turn, round by round, in one process, so a disturbance affects all sides alike. A ratio is the
    median of the rounds' ratios. The engine folder is not changed, but for the quickest runtime that --runtimes all
    remembers in it.

    \b
    prompttune bench engine
    prompttune bench engine --against backbone --against torch --threads 2 --json
    prompttune bench engine --batch-sizes 1,4,16 --mix all --seconds 20 --csv bench.csv
    prompttune bench engine --against backbone --tasks-per-image 10,100
    """
    from prompttune.serve.bench import BenchSettings, bench_engine
    from prompttune.serve.bench.machine import machine_columns, write_csv

    given = given_settings(ctx)
    if {"repeats", "seconds"} <= given.keys():
        raise UsageError("give either --repeats or --seconds")
    with _progress() as on_progress:
        settings = make(BenchSettings, {**given, "weights": weights})
        report = bench_engine(engine, settings, make(RuntimeOptions, given), on_progress)
    if csv_file is not None:
        command = " ".join(["prompttune", *sys.argv[1:]])
        write_csv(csv_file, list(report.rows()), machine_columns(report.device, report.threads, command))
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(wide_console(), report)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show a bar on standard error while the block runs."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda words, share: bar.update(task, description=words, completed=share)


def _print(console: Console, report: BenchReport) -> None:
    """The report as tables and lines."""
    rounds = f"{report.repeats} rounds" if report.seconds is None else f"rounds for {report.seconds:g} s"
    _line(
        console,
        f"{report.method} over {report.backbone} at {report.image_size} pixels, {report.resident_tasks} tasks; "
        f"{report.hardware}, {report.device}, {report.threads} threads; {report.warmup} warm-up rounds, then {rounds}",
    )
    sides = make_table(("side",), ("load s", "peak MiB", "kept MiB", "GPU MiB"))
    for one in report.subjects:
        _line(console, f"{one.name}: {one.description}")
        memory = [_mebibytes(size) for size in (one.peak_bytes, one.resident_bytes, one.device_bytes)]
        sides.add_row(one.name, f"{one.load_s:.2f}", *memory)
    console.print(sides)
    times = make_table(("batch", "mix", "side"), ("tasks", "p50 ms", "p90 ms", "p99 ms", "images/s", "engine takes"))
    for row in report.measurements:
        over = "" if row.engine_over is None else f"{row.engine_over.median:.2f} x"
        figures = [f"{value:.2f}" for value in (row.latency.p50_ms, row.latency.p90_ms, row.latency.p99_ms)]
        times.add_row(
            str(row.batch_size), row.mix, row.subject, str(row.tasks), *figures, f"{row.images_per_s:.1f}", over
        )
    console.print(times)
    for fan in report.fan_out:
        plain = "" if fan.over_backbone is None else f", {fan.over_backbone.median:.2f} x the plain backbone"
        _line(
            console,
            f"batch {fan.batch_size}: {fan.tasks} tasks for each image take {fan.over_one.median:.2f} x as long as "
            f"one{plain}",
        )
    for mixing in report.mixing:
        _line(
            console,
            f"batch {mixing.batch_size}: rows of {mixing.tasks} tasks take {mixing.over_one.median:.3f} x as long as "
            "rows of one task",
        )
    for line in (*_task_lines(report), *filter(None, [report.quickest])):
        _line(console, line)


def _task_lines(report: BenchReport) -> Iterator[str]:
    """Lines about the costs of a task."""
    if report.bytes_per_task:
        yield f"a resident task takes {report.bytes_per_task / 1024:,.1f} KiB ({report.bank_precision})"
    switching, adding = report.switching, report.adding
    if switching is not None:
        yield (
            f"switching tasks between calls: {switching.alternating.p50_ms:.3f} ms a call against "
            f"{switching.same.p50_ms:.3f} ms, {switching.over_same.median:.3f} x"
        )
    if adding is not None:
        yield f"adding a folded task: {adding.state.p50_ms:.2f} ms (p99 {adding.state.p99_ms:.2f} ms)"
        if adding.checkpoint is not None and adding.first_checkpoint_s is not None:
            yield (
                f"adding a checkpoint, not compared with PyTorch: {adding.checkpoint.p50_ms:.1f} ms; "
                f"the first one {adding.first_checkpoint_s:.2f} s, which loads the backbone"
            )


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
