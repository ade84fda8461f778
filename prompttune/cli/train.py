"""``prompttune train``: one task from options and a settings file, or several from a tasks file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from prompttune.cli.options import given_settings, training_options
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import PrompttuneError, UsageError
from prompttune.training.config import TrainConfig, read_yaml
from prompttune.training.multi import TaskOutcome, TrainTask, load_tasks, train_tasks
from prompttune.training.progress import Display, OnProgress, Progress
from prompttune.training.state import RunFolder

SIGNALLED = 128
"""Exit code of a process that a signal ended, less the signal's number."""

EXAMPLES = r"""
prompttune train --backbone vit_small_patch14_dinov2 --image-size 56 \
    --method sa2vp --rank 16 --data demo/digits --epochs 10 --output runs/digits
prompttune train --data photos/ --class-weights balanced --patience 5 --output runs/photos
prompttune train --data demo/shapes-seg --task-type segmentation --head linear --method lspt --image-size 112 \
    --epochs 10 --output runs/shapes-seg
prompttune train --config runs/photos/train_config.yaml --resume
prompttune train --config runs/photos/train_config.yaml --resume --epochs 200
prompttune train --data more-photos/ --init-from runs/photos --output runs/more-photos
prompttune train --config runs/photos/train_config.yaml --lr 5e-4 --output runs/photos-slow
prompttune train --tasks tasks.yaml --output runs --resume

tasks.yaml:
    defaults: {backbone: vit_small_patch14_dinov2, image_size: 56, epochs: 10}
    tasks:
      - {name: digits, data: demo/digits, method: sa2vp, rank: 16}
      - {name: places, data: demo/location, method: lspt}
"""

NOTES = {
    "Augmentation": "These override the preset that --augment names.",
    "Method settings": "The methods with a setting are in brackets after it; other methods refuse it.",
}


@click.command(cls=SectionedCommand, examples=EXAMPLES, notes=NOTES, settings=training_options)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="YAML file of settings, by the names of the options; the command line overrides it.",
)
@click.option("--tasks", "tasks_file", type=click.Path(path_type=Path), help="YAML file of several tasks to train.")
@click.option(
    "--resume",
    is_flag=True,
    help="Resume after the last finished epoch in the output folder; more --epochs than before extend the run.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON on standard output.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    config_file: Path | None,
    tasks_file: Path | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Train one task, or several, over a frozen backbone.

    Pass "none" to unset an optional setting. Every run writes its best checkpoint, curves, metrics and its settings to
    the output folder, and can be resumed after any interruption.
    """
    given = given_settings(ctx)
    flags = {"resume": resume, "overwrite": overwrite}
    console = Console(stderr=True, quiet=quiet)
    with _leaving(ctx), _terminated_like_interrupted():
        if tasks_file is not None:
            if config_file is not None:
                raise UsageError("give --config or --tasks: settings for all tasks are the defaults of the tasks file")
            _train_several(ctx, load_tasks(tasks_file, given), flags, console, as_json)
        else:
            values = read_yaml(config_file) if config_file is not None else {}
            _train_one(ctx, TrainConfig.from_flat({**values, **given}), flags, console, as_json)


def _train_one(ctx: click.Context, config: TrainConfig, flags: dict[str, Any], console: Console, as_json: bool) -> None:
    from prompttune.training.loop import train as run

    try:
        with Display(console) as display:
            result = run(config, on_progress=display, **flags)
    except KeyboardInterrupt as stop:
        settings = RunFolder.of(config.output).settings
        resume = f"; resume with: prompttune train --config {settings} --resume" if settings.exists() else ""
        click.echo(f"Interrupted{resume}", err=True)
        ctx.exit(_exit_code(stop))
    if as_json:
        _print_json({"path": str(result.path), "was_over": result.was_over, **result.metrics})
    elif _is_first_process():
        click.echo(result.summary)


def _train_several(
    ctx: click.Context, tasks: list[TrainTask], flags: dict[str, Any], console: Console, as_json: bool
) -> None:
    try:
        with Display(console) as display:
            outcomes = train_tasks(tasks, on_progress=display, on_task=_announcer(display, len(tasks)), **flags)
    except KeyboardInterrupt as stop:
        click.echo("Interrupted; run the same command with --resume", err=True)
        ctx.exit(_exit_code(stop))
    if as_json:
        _print_json([outcome.to_dict() for outcome in outcomes])
    elif _is_first_process():
        Console().print(_table(outcomes))
        for outcome in outcomes:
            if outcome.error is not None:
                click.echo(f"{outcome.task.name}: {outcome.error}", err=True)
    if any(outcome.error is not None for outcome in outcomes):
        ctx.exit(1)


def _announcer(display: OnProgress, count: int) -> Any:
    def announce(index: int, task: TrainTask) -> None:
        if _is_first_process():
            display(Progress("note", text=f"\n[{index + 1}/{count}] {task.name}"))

    return announce


def _table(outcomes: list[TaskOutcome]) -> Table:
    table = Table("task", "method", "data", "score", "best epoch", "checkpoint")
    for outcome in outcomes:
        task, result = outcome.task, outcome.result
        figures = ("failed", "", "") if result is None else (
            f"{result.score_title} {result.best_score:.2%}",
            f"{result.best_epoch} of {result.epochs}",
            str(result.path),
        )  # fmt: skip
        table.add_row(task.name, task.config.method, str(task.config.data), *figures)
    return table


def _print_json(value: Any) -> None:
    if _is_first_process():
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _is_first_process() -> bool:
    """Whether this process prints; a data-parallel run starts the command once for each device."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def _leaving(ctx: click.Context) -> Iterator[None]:
    """Let only the first process report: all processes of a data-parallel run fail alike."""
    try:
        yield
    except PrompttuneError as problem:
        if _is_first_process():
            raise
        ctx.exit(problem.exit_code)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM raise :class:`KeyboardInterrupt` with its number, so that finished epochs are written."""

    def stop(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(stop: KeyboardInterrupt) -> int:
    return SIGNALLED + int(stop.args[0] if stop.args else signal.SIGINT)
