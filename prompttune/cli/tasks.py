"""``prompttune tasks add | remove | list``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from prompttune.cli.engine_options import (
    gate_options,
    make_table,
    named_checkpoints,
    named_data,
    no_parity_option,
    weights_option,
    wide_console,
)


@click.group()
def tasks() -> None:
    """Add, remove or list the tasks of an ENGINE folder. The graph is never touched.

    \b
    prompttune tasks list engine
    prompttune tasks add engine runs/shapes colours=runs/c
    prompttune tasks remove engine shapes
    """


@tasks.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--replace", is_flag=True, help="Replace tasks of the same name.")
@gate_options
@no_parity_option
@weights_option
@click.option("--json", "as_json", is_flag=True, help="Print the added tasks as JSON.")
def add(
    engine: Path,
    runs: tuple[str, ...],
    replace: bool,
    data: tuple[str, ...],
    atol: float | None,
    min_agreement: float | None,
    max_accuracy_loss: float | None,
    batch_sizes: tuple[int, ...],
    images: int,
    no_parity: bool,
    weights: str | None,
    as_json: bool,
) -> None:
    """Add checkpoints RUN to ENGINE as tasks, each compared with PyTorch first.

    A task is called as its checkpoint folder; NAME=PATH gives it another name.

    \b
    prompttune tasks add engine runs/shapes
    prompttune tasks add engine shapes=runs/shapes-v2 --replace
    """
    from prompttune.export import EngineFolder, Gate, add_task
    from prompttune.export.gate import engine_precision

    named = named_checkpoints(runs)
    chosen = named_data(data, named)
    gate = Gate.for_precision(
        engine_precision(EngineFolder(engine, verify=False).manifest),
        atol=atol,
        min_agreement=min_agreement,
        max_accuracy_loss=max_accuracy_loss,
        batch_sizes=batch_sizes,
        images=images,
    )
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
                gate=gate,
                weights=weights,
                on_stage=status.update,
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
@click.option("--json", "as_json", is_flag=True, help="Print the tasks that are left as JSON.")
def remove(engine: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Remove the tasks NAME from ENGINE.

    \b
    prompttune tasks remove engine shapes
    """
    from prompttune.errors import choose
    from prompttune.export import EngineFolder

    folder = EngineFolder(engine, verify=False)
    for name in dict.fromkeys(names):
        choose("task", name, folder.tasks())
    for name in dict.fromkeys(names):
        folder.remove_task(name)
    if as_json:
        click.echo(json.dumps({"removed": list(dict.fromkeys(names)), "tasks": folder.tasks()}, indent=2))
    else:
        click.echo(f"removed {', '.join(dict.fromkeys(names))}; left: {', '.join(folder.tasks()) or 'none'}")


@tasks.command(name="list")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the tasks as JSON.")
def list_(engine: Path, as_json: bool) -> None:
    """List the tasks of ENGINE.

    \b
    prompttune tasks list engine
    """
    from prompttune.export import list_tasks

    held = list_tasks(engine)
    if as_json:
        click.echo(json.dumps({name: task.to_dict() for name, task in held.items()}, indent=2))
        return
    table = make_table(("task", "version", "from"), ("classes", "kB"))
    table.add_column("labels", overflow="ellipsis", no_wrap=True)
    for name, task in held.items():
        size = sum(value.nbytes for value in task.state.values()) / 1e3
        source = str(task.source.get("checkpoint", ""))
        table.add_row(name, task.version, source, str(task.num_classes), f"{size:.0f}", ", ".join(task.labels))
    wide_console().print(table)
