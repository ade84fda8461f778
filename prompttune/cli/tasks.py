"""``prompttune tasks add | remove | list``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress

from prompttune.cli.engine_options import (
    data_option,
    named_checkpoints,
    named_data,
    no_parity_option,
    weights_option,
    wide_console,
)
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.export.options import GateOptions
from prompttune.settings import make

if TYPE_CHECKING:
    from prompttune.export.folder import Scan


@click.group()
def tasks() -> None:
    """Add, remove or list the tasks of an ENGINE folder. The graph is never changed.

    \b
    prompttune tasks list engine
    prompttune tasks add engine runs/shapes colours=runs/c
    prompttune tasks remove engine shapes
    """


@tasks.command(cls=SectionedCommand, settings=lambda: options_of(GateOptions))
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--replace", is_flag=True, help="Replace tasks of the same name.")
@data_option
@no_parity_option
@weights_option
@click.option("--json", "as_json", is_flag=True, help="Print the added tasks as JSON.")
@click.pass_context
def add(
    ctx: click.Context,
    /,
    engine: Path,
    runs: tuple[str, ...],
    replace: bool,
    data: tuple[str, ...],
    no_parity: bool,
    weights: str | None,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Add checkpoints RUN to ENGINE as tasks, each compared with PyTorch first.

    A task has the name of its checkpoint folder; NAME=PATH gives it another name.

    \b
    prompttune tasks add engine runs/shapes
    prompttune tasks add engine shapes=runs/shapes-v2 --replace
    """
    from prompttune.export import add_task

    named = named_checkpoints(runs)
    chosen = named_data(data, named)
    thresholds = asdict(make(GateOptions, given_settings(ctx)))
    added = {}
    with Console(stderr=True).status("starting") as status:
        for name, checkpoint in named.items():
            task = add_task(
                engine,
                name,
                checkpoint,
                replace=replace,
                data=chosen.get(name) if isinstance(chosen, dict) else chosen,
                parity=not no_parity,
                weights=weights,
                on_stage=status.update,
                **thresholds,
            )
            added[name] = task
    if as_json:
        click.echo(json.dumps({name: task.to_dict() for name, task in added.items()}, indent=2))
        return
    for name, task in added.items():
        worst = max((one["max_abs"] for one in (task.parity or {}).get("comparisons", [])), default=None)
        proof = "not compared with PyTorch" if worst is None else f"within {worst:.1e} of PyTorch"
        click.echo(f"added {name}: {task.num_classes} classes, version {task.version}, {proof}")


@tasks.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--json", "as_json", is_flag=True, help="Print the remaining tasks as JSON.")
def remove(engine: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Remove the tasks NAME from ENGINE.

    \b
    prompttune tasks remove engine shapes
    """
    from prompttune.errors import some_names
    from prompttune.export import EngineFolder

    folder = EngineFolder(engine, verify=False)
    with folder.locked():
        for name in dict.fromkeys(names):
            folder.task_folder(name)
        for name in dict.fromkeys(names):
            folder.remove_task(name)
        left = folder.tasks()
    if as_json:
        click.echo(json.dumps({"removed": list(dict.fromkeys(names)), "tasks": left}, indent=2))
    else:
        click.echo(f"removed {', '.join(dict.fromkeys(names))}; left: {some_names(left)}")


@tasks.command(name="list")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every state and check its digest; exit code 1 if a task is damaged.")
@click.option("--json", "as_json", is_flag=True, help="Print the tasks as JSON.")
def list_(engine: Path, verify: bool, as_json: bool) -> None:
    """List the tasks of ENGINE, with a line for each one that is damaged.

    \b
    prompttune tasks list engine
    prompttune tasks list engine --verify
    """
    from prompttune.export import EngineFolder

    folder = EngineFolder(engine, verify=verify)
    with Progress(console=Console(stderr=True), transient=True, disable=not verify) as bar:
        step = bar.add_task("checking", total=len(folder.tasks()) if verify else None)
        scan = folder.scan(verify, lambda: bar.advance(step))
    if as_json:
        damaged = {name: {"damaged": problem} for name, problem in scan.problems.items()}
        shown = {name: record.values for name, record in scan.records.items()}
        click.echo(json.dumps(dict(sorted({**shown, **damaged}.items())), indent=2))
    else:
        click.echo("\n".join(_table(scan, wide_console().width)))
        for name, problem in scan.problems.items():
            click.echo(f"damaged: {name}: {problem}", err=True)
    if verify and scan.problems:
        raise SystemExit(1)


def _table(scan: Scan, width: int) -> list[str]:
    """A line for each task; rich's tables take a millisecond per row, which is seconds for thousands of tasks."""
    rows = [("task", "version", "from", "classes", "kB", "labels")]
    for name, record in scan.records.items():
        source = str(record.values.get("source", {}).get("checkpoint", ""))
        size, labels = f"{record.state.size / 1e3:.0f}", ", ".join(record.labels[:width])
        rows.append((name, record.version, source, str(len(record.labels)), size, labels))
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)][:-1]
    left = max(width - sum(widths) - 2 * len(widths), 20)
    lines = []
    for *cells, labels in rows:
        sized = [set_cell_size(cell, size) for cell, size in zip(cells, widths, strict=True)]
        sized[3:5] = [cell.rjust(size) for cell, size in zip(cells[3:5], widths[3:5], strict=True)]
        shown = labels if cell_len(labels) <= left else set_cell_size(labels, left - 1).rstrip() + "…"
        lines.append("  ".join([*sized, shown]))
    return lines
