"""``prompttune explain``: explanations of runs next to their plain backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import UsageError
from prompttune.explanation.settings import ExplainSettings
from prompttune.settings import make

EXAMPLES = """
prompttune explain runs/digits photos/ --output report/
prompttune explain runs/digits-sa2vp runs/digits-lspt photos/cat.jpg --layers 0,3,7,11 --output report/
prompttune explain runs/digits-sa2vp photos/ --point 120,80 --show similarity --output report/
prompttune explain runs/digits-sa2vp runs/digits-gapt --data demo/digits --output report/
"""


@click.command(cls=SectionedCommand, examples=EXAMPLES, settings=lambda: options_of(ExplainSettings))
@click.argument("inputs", nargs=-1, required=True, metavar="RUN... [IMAGES]...", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the page and the pictures.")
@click.option("--data", help="Labelled images for t-SNE: a folder, CSV, data set name or built-in, as for train.")
@click.option("--weights", help="Source of the backbones' weights, if it differs from that of the training.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the written files and the figures as JSON.")
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    inputs: tuple[Path, ...],
    output: Path,
    data: str | None,
    weights: str | None,
    quiet: bool,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Draw explanations of runs, each next to its plain backbone.

    RUN is a checkpoint folder, IMAGES are files and folders of images. The output is PNG files, explanation.json and
    explanation.html, a page with everything: attention maps by layer, Grad-CAM of the last layer, the similarity of an
    image token to the prompt map (sa2vp), t-SNE of labelled images (--data), and gates and temperatures (gapt).
    """
    from prompttune.explanation import explain as explain_runs
    from prompttune.explanation.subjects import is_run

    runs = [path for path in inputs if is_run(path)]
    if not runs:
        raise UsageError(f"none of {', '.join(map(str, inputs))} is the folder of a checkpoint")
    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        result = explain_runs(
            runs,
            [path for path in inputs if path not in runs],
            output=output,
            data=data,
            weights=weights,
            on_step=on_step,
            **vars(make(ExplainSettings, given_settings(ctx))),
        )
    for line in result.corrupt:
        click.echo(f"unreadable image: {line}", err=True)
    for note in result.notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        images = len(result.values["images"])
        click.echo(f"{images} images, {len(runs)} runs, {len(result.pictures)} pictures: {result.files[0]}")
