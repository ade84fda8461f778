"""``prompttune evaluate``: the accuracy of a prompt checkpoint on a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from prompttune.checkpoints import read_config
from prompttune.cli.options import DATA_SETTINGS, setting_options
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import CheckpointError, UsageError
from prompttune.evaluation.result import percent
from prompttune.evaluation.segmentation import SegmentationEvaluation
from prompttune.fields import coerce_all, settings_of
from prompttune.files import write_json
from prompttune.limits import out_of_bounds
from prompttune.training.config import TrainConfig, read_yaml
from prompttune.training.scoring import SPLITS, EvaluationResult
from prompttune.training.scoring import evaluate as evaluate_model
from prompttune.training.state import RunFolder

EXAMPLES = """
prompttune evaluate runs/digits
prompttune evaluate runs/shapes-seg --json
prompttune evaluate runs/photos --data other-photos/ --split all --json
"""
SHOWN_CLASSES = 40
SETTINGS = (*DATA_SETTINGS, "seed", "batch_size", "device")
REMEMBERED = ("data", "data_root", "val_fraction", "reduce_zero_label", "limit", "seed", "max_corrupt")
"""Settings that are taken from the run where no other data is named."""


@click.command(cls=SectionedCommand, examples=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), default=SPLITS[0], show_default=True, help="Which images to score.")
@click.option("--weights", help="Where to take the backbone's weights from, if not from where training took them.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for evaluation.json and confusion_matrix.png.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Folder for a report: evaluation.html, evaluation.json, pictures of confusion and reliability.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    checkpoint: Path,
    split: str,
    weights: str | None,
    output: Path | None,
    report: Path | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Report accuracy, calibration error (ECE), and precision and recall of each class of a prompt checkpoint.

    Of a segmentation: IoU of each class, their mean, and the share of right pixels.

    Without --data, the validation images that the run itself held out are scored.
    """
    chosen = _settings(ctx, checkpoint, settings)
    segments = read_config(checkpoint).get("segmentation") is not None
    if segments and report is not None:
        raise UsageError("--report shows a classification: give --output, which takes a segmentation's figures")
    # Masks bring their own validation split; a class has no label 0 to leave out.
    chosen.pop("val_fraction" if segments else "reduce_zero_label")
    scorer: Callable[..., EvaluationResult | SegmentationEvaluation] = evaluate_model
    if segments:
        from prompttune.training.segmenting import evaluate_segmentation as scorer
    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("images", total=None)
        result = scorer(
            checkpoint,
            split=split,
            weights=weights,
            on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            **chosen,
        )
    document = {"checkpoint": str(checkpoint), "data": chosen["data"], "split": split, **result.to_dict()}
    if output is not None:
        _write(output, document, result)
    if isinstance(result, EvaluationResult) and report is not None:
        _report(report, document, result)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    if isinstance(result, EvaluationResult):
        _show(result)
    else:
        _show_segmentation(result, document["class_pixels"])
    for line in result.corrupt:
        click.echo(f"unreadable image: {line}", err=True)


evaluate.params.extend(
    setting_options([known for name, known in settings_of(TrainConfig).items() if name in SETTINGS], "Data")
)


def _settings(ctx: click.Context, checkpoint: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The command line's settings, over the run's where its own data is meant, over the defaults."""
    typed = _checked(
        {name: value for name, value in given.items() if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    )
    defaults = {name: known.default for name, known in settings_of(TrainConfig).items() if name in SETTINGS}
    remembered: dict[str, Any] = {}
    if "data" not in typed:
        file = RunFolder(checkpoint).settings
        if not checkpoint.is_dir():
            raise CheckpointError(f"no checkpoint folder at {checkpoint}")
        if not file.exists():
            raise UsageError(f"{checkpoint} does not say what it was trained on: give --data")
        remembered = {name: value for name, value in read_yaml(file).items() if name in REMEMBERED}
        try:
            remembered = _checked(remembered)
        except UsageError as problem:
            raise UsageError(f"{file} is damaged: {problem}; give --data") from None
    chosen = {**defaults, **remembered, **typed}
    return {**chosen, "workers": chosen["workers"] or 0}


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings brought to their types and held to their bounds; :class:`UsageError` names one that does not fit."""
    known = settings_of(TrainConfig)
    made = coerce_all(values, known, "setting")
    for name, value in made.items():
        if isinstance(value, int | float) and (problem := out_of_bounds(name, value, known[name].metadata)):
            raise UsageError(problem)
    return made


def _write(folder: Path, document: dict[str, Any], result: EvaluationResult | SegmentationEvaluation) -> None:
    from prompttune.evaluation.plots import confusion_figure, draw_confusion, save_png

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", document)
    if isinstance(result, EvaluationResult):
        figure = confusion_figure(result)
    else:
        figure = draw_confusion(result.confusion, result.labels, unit="pixels")
    save_png(figure, folder / "confusion_matrix.png")


def _report(folder: Path, document: dict[str, Any], result: EvaluationResult) -> None:
    from prompttune.evaluation.report import write_report

    checkpoint = Path(document["checkpoint"])
    about = {name: str(document[name]) for name in ("checkpoint", "data", "split")}
    write_report({checkpoint.resolve().name: result}, folder, title=f"Evaluation of {checkpoint}", about=about)


def _show(result: EvaluationResult) -> None:
    console = Console()
    figures = Table("top-1", "top-5", "balanced", "loss", "ECE", "images", "unreadable")
    figures.add_row(
        *(percent(value) for value in (result.top1, result.top5, result.balanced_accuracy)),
        f"{result.loss:.4f}",
        percent(result.ece),
        str(result.n),
        str(len(result.corrupt)),
    )
    console.print(figures)
    known = [(label, one) for label, one in result.report.items() if one.recall is not None]
    worst = len(known) > SHOWN_CLASSES
    if worst:
        known = sorted(known, key=lambda pair: pair[1].recall or 0.0)[:SHOWN_CLASSES]
    table = Table(
        "class", "accuracy", "precision", "F1", "images", title=f"the {SHOWN_CLASSES} worst classes" if worst else None
    )
    for label, one in known:
        table.add_row(escape(label), percent(one.recall), percent(one.precision), percent(one.f1), str(one.support))
    console.print(table)


def _show_segmentation(result: SegmentationEvaluation, class_pixels: dict[str, int]) -> None:
    console = Console()
    figures = Table("mIoU", "pixel accuracy", "loss", "images", "unreadable")
    shares = (percent(result.miou), percent(result.pixel_accuracy), f"{result.loss or 0.0:.4f}")
    figures.add_row(*shares, str(result.n), str(len(result.corrupt)))
    console.print(figures)
    table = Table("class", "IoU", "pixels")
    for label, iou in result.iou.items():
        table.add_row(escape(label), percent(iou), str(class_pixels[label]))
    console.print(table)
