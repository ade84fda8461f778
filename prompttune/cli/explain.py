"""``prompttune explain``: explanations of runs next to their plain backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from prompttune.cli.sections import SectionedCommand
from prompttune.errors import UsageError

EXAMPLES = """
prompttune explain runs/digits photos/ --output report/
prompttune explain runs/digits-sa2vp runs/digits-lspt photos/cat.jpg --layers 0,3,7,11 --output report/
prompttune explain runs/digits-sa2vp photos/ --point 120,80 --show similarity --output report/
prompttune explain runs/digits-sa2vp runs/digits-gapt --data demo/digits --output report/
"""
PARTS = ("attention", "grad-cam", "similarity", "tsne", "values")
SPLITS = ("val", "test", "train", "all")


class Pair(click.ParamType[Any]):
    """Two numbers separated by a comma."""

    def __init__(self, kind: type[int] | type[float], metavar: str) -> None:
        self.kind = kind
        self.name = metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Bring the text to two numbers, or fail as click does."""
        try:
            first, second = (self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return first, second


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:  # noqa: ARG001
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,5,11") from None


def _heads(ctx: click.Context, param: click.Parameter, value: str) -> str | int:  # noqa: ARG001
    return int(value) if value.isdecimal() else value


@click.command(cls=SectionedCommand, examples=EXAMPLES)
@click.argument("inputs", nargs=-1, required=True, metavar="RUN... [IMAGES]...", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the page and the pictures.")
@click.option(
    "--show",
    multiple=True,
    type=click.Choice(PARTS),
    help="Part to draw; may be repeated.  [default: all that the runs and the inputs allow]",
)
@click.option("--layers", callback=_layers, help="Blocks to draw, counted from 0, such as 0,5,11.  [default: up to 12]")
@click.option(
    "--heads", default="mean", show_default=True, callback=_heads, help="Attention heads: mean, each, or a number."
)
@click.option(
    "--token", type=Pair(int, "ROW,COLUMN"), help="Image token to compare with the prompt map.  [default: centre]"
)
@click.option("--point", type=Pair(float, "X,Y"), help="The same token as a pixel of the image.")
@click.option("--label", "target", help="Label that Grad-CAM explains.  [default: the predicted one]")
@click.option("--limit", type=click.IntRange(1), default=16, show_default=True, help="Most images to explain.")
@click.option("--data", help="Labelled images for t-SNE: a folder, CSV, data set name or built-in, as for train.")
@click.option(
    "--split", type=click.Choice(SPLITS), help="Split of --data to show.  [default: val, else test, else all]"
)
@click.option("--data-limit", type=click.IntRange(1), default=500, show_default=True, help="Largest number of them.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of t-SNE.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images per forward pass.")
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:INDEX.")
@click.option("--weights", help="Source of the backbones' weights, if it differs from that of the training.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the written files and the figures as JSON.")
def explain(
    inputs: tuple[Path, ...],
    output: Path,
    show: tuple[str, ...],
    data: str | None,
    weights: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
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
            show=show or None,
            **settings,
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
