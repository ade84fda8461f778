"""``prompttune validate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from prompttune.cli.engine_options import (
    data_option,
    named_data,
    parity_tables,
    weights_option,
    wide_console,
)
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import ParityError
from prompttune.evaluation.scored import DEFAULT_SPLIT, SPLITS
from prompttune.export.options import GateOptions, RuntimeOptions
from prompttune.settings import make


def _options() -> list[click.Parameter]:
    return options_of(GateOptions, RuntimeOptions)


@click.command(cls=SectionedCommand, settings=_options)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Compare with this other engine instead of PyTorch: the tasks of the same names. Needs no backbone weights.",
)
@click.option("--task", "tasks", multiple=True, help="Task to validate; may be repeated.  [default: all]")
@data_option
@click.option("--limit", type=click.IntRange(1), help="Largest number of images of each task.")
@click.option("--split", type=click.Choice(SPLITS), help=f"Images of --data to evaluate.  [default: {DEFAULT_SPLIT}]")
@weights_option
@click.option("--debug", is_flag=True, help="Compare block by block and name the first result that diverges (ONNX).")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report to this JSON file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the report, with plots, to this HTML file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def validate(
    ctx: click.Context,
    /,
    engine: Path,
    against: Path | None,
    tasks: tuple[str, ...],
    data: tuple[str, ...],
    limit: int | None,
    split: str | None,
    weights: str | None,
    debug: bool,
    output: Path | None,
    html: Path | None,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Compare ENGINE with PyTorch, or with another engine: every task, mixed batches, swaps, neighbours.

    With --data, the images of --split (all images of a data set without splits) go through both sides, and both are
    evaluated: accuracy and calibration error here; precision and recall of each class, confusion and calibration of
    both with --json and --output, pictures of the engine's with --html. A data set for every task is evaluated only for
    the tasks that have its classes. The thresholds follow the precision of the engine, or the less strict one of two
    engines. If a figure exceeds its threshold, the exit code is 1, and one line names the worst figure.

    \b
    prompttune validate engine
    prompttune validate engine --data digits=demo/digits --data shapes=folder/of/images
    prompttune validate engine --data demo/digits --output report.json --html report.html
    prompttune validate engine-fp16 --against engine
    prompttune validate engine --debug
    """
    from prompttune.export import validate_engine
    from prompttune.files import write_json
    from prompttune.serve import Engine

    given = given_settings(ctx)
    runtime = make(RuntimeOptions, given)
    with Console(stderr=True).status("opening the engine") as status:
        opened = Engine(engine, **asdict(runtime))
        report = validate_engine(
            engine,
            named_data(data, opened.tasks),
            against=against,
            **asdict(make(GateOptions, given)),
            tasks=tasks or None,
            limit=limit,
            split=split,
            weights=weights,
            debug=debug,
            runner=opened,
            options=runtime,
            on_stage=status.update,
        )
    values = report.to_dict()
    if output is not None:
        write_json(output, values)
    if html is not None:
        from prompttune.export.parity.html import write_html

        write_html(report, str(engine), html)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        parity_tables(wide_console(), values)
    if not report.passed:
        side = "PyTorch" if against is None else str(against)
        raise ParityError(f"{engine} does not answer as {side} does: {report.failures[0]}")
    if not as_json:
        click.echo("passed")
