"""``prompttune evaluate``: the accuracy of a prompt checkpoint on a data set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from prompttune.checkpoints import read_config
from prompttune.cli.options import over_file
from prompttune.cli.sections import SectionedCommand
from prompttune.evaluation.scored import DEFAULT_SPLIT, SPLITS
from prompttune.files import write_json
from prompttune.settings import settings_of
from prompttune.task_types import Result, read_task_type
from prompttune.training.config import DATA, TrainConfig
from prompttune.training.own_data import data_settings
from prompttune.training.scoring import evaluate as evaluate_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """
prompttune evaluate runs/digits
prompttune evaluate runs/shapes-seg --json
prompttune evaluate runs/photos --data other-photos/ --json
prompttune evaluate runs/photos --data photos/ --split test
"""
OTHERS = ("seed", "batch_size", "device")
"""Training settings that an evaluation uses besides those of the data."""


def _settings() -> list[click.Parameter]:
    known = settings_of(TrainConfig).values()
    taken = [one for one in known if (one.section == DATA and one.name != "val_fraction") or one.name in OTHERS]
    return over_file([dataclasses.replace(one, section=DATA) for one in taken], DATA)


@click.command(cls=SectionedCommand, examples=EXAMPLES, settings=_settings)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), help=f"Images to score.  [default: {DEFAULT_SPLIT}]")
@click.option("--weights", help="Source of the backbone's weights, if it differs from that of the training.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for evaluation.json and confusion_matrix.png.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Folder for a report: evaluation.html, evaluation.json, pictures of confusion and reliability.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def evaluate(
    checkpoint: Path,
    split: str | None,
    weights: str | None,
    output: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Report accuracy, calibration error (ECE), and precision and recall of each class of a prompt checkpoint.

    For a segmentation it reports the IoU of each class, their mean, and the share of right pixels.

    Without --data, the validation images that the run itself held out are scored, even if images were added to its
    data. With --data, a data set without splits is scored whole.
    """
    typed = {name: value for name, value in settings.items() if value is not None}
    data = data_settings(checkpoint, typed.get("data"), typed)["data"]
    kind = read_task_type(read_config(checkpoint))
    if report is not None:
        kind.refuse("report")
    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("images", total=None)
        result = evaluate_model(
            checkpoint,
            split=split,
            weights=weights,
            on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            **{"batch_size": TrainConfig.batch_size, **typed},
        )
    assert result.chosen is not None
    head = {"checkpoint": str(checkpoint), "data": data, "split": result.chosen.split, "notes": result.notes}
    document = {**head, **result.to_dict()}
    if output is not None:
        _write(output, document, kind.figure(result))
    if report is not None:
        _report(report, document, result)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _show(result)
    click.echo(f"scored {result.n} images: {result.chosen.what}", err=True)
    for line in (*result.notes, *(f"unreadable image: {line}" for line in result.corrupt or ())):
        click.echo(line, err=True)


def _write(folder: Path, document: dict[str, Any], figure: Figure) -> None:
    from prompttune.evaluation.plots import save_png

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", document)
    save_png(figure, folder / "confusion_matrix.png")


def _report(folder: Path, document: dict[str, Any], result: Any) -> None:
    from prompttune.evaluation.report import write_report

    checkpoint = Path(document["checkpoint"])
    about = {name: str(document[name]) for name in ("checkpoint", "data", "split")}
    write_report({checkpoint.resolve().name: result}, folder, title=f"Evaluation of {checkpoint}", about=about)


def _show(result: Result) -> None:
    console = Console()
    for one in result.tables():
        table = Table(*one.titles, title=one.caption)
        for row in one.rows:
            table.add_row(*map(escape, row))
        console.print(table)
