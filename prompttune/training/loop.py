"""``train``: one task from its settings to its run folder, from the start or resumed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompttune.errors import CheckpointError, UsageError
from prompttune.files import locked, read_json
from prompttune.training import state as states
from prompttune.training.config import TrainConfig
from prompttune.training.launch import launch, on_rank_zero
from prompttune.training.progress import Display, OnProgress, Progress
from prompttune.training.run import Run
from prompttune.training.state import Progression, RunFolder

if TYPE_CHECKING:
    from prompttune.backbones import Backbone


@dataclass(frozen=True)
class TrainResult:
    """Result of a run."""

    path: Path
    """The run folder; ``PromptModel.load`` reads its best checkpoint."""
    best_score: float
    """Score of the best checkpoint on the validation images, such as top-1, between 0 and 1."""
    best_epoch: int
    epochs: int
    """Number of finished epochs."""
    status: str
    """``finished`` or ``stopped early``."""
    metrics: dict[str, Any]
    """The content of ``metrics.json``."""
    score_title: str = "top-1"
    """Name of the score."""
    was_over: bool = False
    """Whether the run had already ended, so that there was nothing to resume."""

    @property
    def summary(self) -> str:
        """One line for people."""
        what = f"already {self.status}, nothing to resume" if self.was_over else self.status
        return (
            f"{what} after {self.epochs} epochs: {self.score_title} {self.best_score:.2%} on the validation images "
            f"(epoch {self.best_epoch}); checkpoint: {self.path}"
        )


def train(
    config: TrainConfig,
    backbone: Backbone | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    progress: bool = False,
) -> TrainResult:
    """Train one task and write its run folder, ``config.output``.

    The global random generators are seeded for every epoch. On the CPU, the same settings and number of threads give a
    bit-identical checkpoint, whether or not the run was interrupted and resumed.

    Args:
        config: the settings of the run.
        backbone: a loaded backbone, which other tasks may share; None loads the one that ``config`` names.
        resume: continue after the last finished epoch in ``config.output``, or start if there is none. With more epochs
            than before, the run is extended: from its current step on, the learning rate follows the schedule over the
            new number of epochs.
        overwrite: whether to replace an earlier run in ``config.output``.
        on_progress: called with the news, in the first process.
        progress: whether to show the command's progress display, on standard error or in the notebook.

    Raises:
        UsageError: another run writes to the output, or the output is not empty and neither ``resume`` nor
            ``overwrite`` is given, or the run to resume had other settings, which the message names.
        DataError: the data cannot be read, or the number of unreadable images exceeds ``config.max_corrupt``.
        TrainingError: the loss or a parameter is not finite any more; saved files are not changed.
    """
    if progress:
        from rich.console import Console

        with Display(Console(stderr=True)) as display:
            result = train(
                config, backbone, resume=resume, overwrite=overwrite, on_progress=_both(display, on_progress)
            )
            display(Progress("note", text=result.summary))
            return result
    fabric = launch(config)
    folder = RunFolder.of(config.output)
    saved = None
    with contextlib.ExitStack() as held:
        on_rank_zero(fabric, lambda: held.enter_context(locked(folder.path)))
        if on_rank_zero(fabric, lambda: folder.check(resume=resume, overwrite=overwrite)):
            saved = states.load(folder.last)
            if differences := config.differences(saved.settings):
                raise UsageError(f"cannot resume {folder.path} with other settings: {'; '.join(differences)}")
            if saved.progression.is_over and not saved.progression.goes_on(config.epochs, config.patience):
                if config.epochs > saved.settings["epochs"]:
                    raise UsageError(
                        f"{folder.path} stopped early after epoch {saved.progression.epoch}: its patience of "
                        f"{config.patience} is spent; with more epochs, give a higher --patience or --patience none too"
                    )
                return _result(config, folder, saved.progression, was_over=True)
        backbone = backbone or _load_backbone(config)
        _check_backbone(config, backbone)
        run = Run(config, backbone, fabric, on_progress, saved)
        return _result(config, folder, run.go(saved))


def _both(first: OnProgress, second: OnProgress | None) -> OnProgress:
    def tell(news: Progress) -> None:
        first(news)
        if second is not None:
            second(news)

    return tell


def _result(config: TrainConfig, folder: RunFolder, progression: Progression, was_over: bool = False) -> TrainResult:
    metrics = read_json(folder.metrics, CheckpointError, "metrics file")
    return TrainResult(
        path=folder.path,
        best_score=progression.best_score,
        best_epoch=progression.best_epoch,
        epochs=progression.epoch,
        status=progression.status,
        metrics=metrics,
        score_title=config.chosen_type().measures.score_title,
        was_over=was_over,
    )


def _load_backbone(config: TrainConfig) -> Backbone:
    from prompttune.backbones import load_backbone

    return load_backbone(config.backbone, config.image_size, config.weights)


def _check_backbone(config: TrainConfig, backbone: Backbone) -> None:
    """Check that a given backbone is the one in the settings, otherwise the run folder would be wrong."""
    if backbone.name != config.backbone:
        raise UsageError(f"the settings name the backbone {config.backbone}, but {backbone.name} was given")
    if config.image_size not in (None, backbone.image_size):
        raise UsageError(f"the settings say image size {config.image_size}, the backbone has {backbone.image_size}")
