"""Evaluation of a prompt model, with the figures of :mod:`prompttune.evaluation`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prompttune.data import Batch, CorruptImages, EpochLoader, make_loader
from prompttune.data.loading import loading
from prompttune.data.objects import Data, is_source, settled
from prompttune.errors import UsageError
from prompttune.evaluation.result import Evaluation
from prompttune.evaluation.scored import Chosen, match_classes
from prompttune.evaluation.tally import Tally
from prompttune.model import PromptModel
from prompttune.training.own_data import choose_images, data_settings

if TYPE_CHECKING:
    from prompttune.backbones import Backbone


@dataclass(frozen=True, eq=False)
class EvaluationResult(Evaluation):
    """An evaluation of a model; every logit is known, and so is every figure."""

    top5: float
    loss: float
    """Mean cross entropy, in nats; NaN if a logit was not finite."""
    corrupt: tuple[str, ...] = ()
    """One line for each image that could not be read."""
    chosen: Chosen | None = None
    """Which images were scored; None during a training."""

    @property
    def notes(self) -> list[str]:
        """Remarks about the images and their classes, one line each."""
        return [*(() if self.chosen is None else self.chosen.notes), *super().notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**super().to_dict(), "corrupt": list(self.corrupt)}


class Scores:
    """Sums over batches of tensors; the sums of several processes can be added."""

    def __init__(self, classes: int, unseen: int = 0) -> None:
        self.tally = Tally(classes, unseen)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, C], class indices [B]."""
        self.tally.add_logits(logits.float().cpu().numpy(), targets.cpu().numpy())

    def result(
        self, labels: Sequence[str], corrupt: Sequence[str] = (), reduce: Callable[[Tensor], Tensor] | None = None
    ) -> EvaluationResult:
        """The figures; ``reduce`` sums a tensor over the processes.

        Raises:
            DataError: there were no images.
        """
        whole = self.tally
        if reduce is not None:
            whole = Tally(self.tally.classes, self.tally.rows - self.tally.classes)
            whole.merge({name: reduce(torch.from_numpy(part)).numpy() for name, part in self.tally.arrays().items()})
        result = whole.result(labels)
        values = {one.name: getattr(result, one.name) for one in dataclasses.fields(result)}
        return EvaluationResult(**values, corrupt=tuple(corrupt))


class Sums(Protocol):
    """A counter of the answers to batches."""

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""


@torch.no_grad()
def score(
    model: PromptModel,
    batches: Iterable[Batch],
    scores: Sums,
    *,
    device: torch.device,
    columns: Tensor | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_batch: Callable[[Batch], None] | None = None,
) -> None:
    """Run the base pathway over batches and add its answers to ``scores``.

    Args:
        model: the model, which is left in evaluation mode.
        batches: images [B, 3, S, S] and class indices [B] of the data, or masks of them.
        scores: counter of the answers.
        device: device of the model.
        columns: index to count each class of the data as, [classes of the data]; None if they are the model's.
        autocast: context of the forward pass.
        on_batch: called after each batch.
    """
    model.eval()
    for batch in batches:
        if len(batch.targets):
            targets = batch.targets if columns is None else columns[batch.targets]
            with autocast():
                logits = model(batch.images.to(device, non_blocking=True)).logits
            scores.add(logits, targets.to(device))
        if on_batch is not None:
            on_batch(batch)


@loading()
def score_all(
    model: PromptModel,
    loaders: Sequence[EpochLoader],
    images: int,
    scores: Sums,
    *,
    device: torch.device,
    max_corrupt: int,
    columns: Sequence[Tensor | None],
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Run :func:`score` over loaders with ``images`` images in total; the model keeps its mode.

    Args:
        model, scores, device: see :func:`score`.
        loaders: one loader per source.
        columns: see :func:`score`, one per loader.
        images: total number of images, for the progress.
        max_corrupt: number of unreadable images to tolerate.
        on_batch: called with the number of finished images and of all images.

    Returns:
        One line for each image that could not be read.

    Raises:
        DataError: the number of unreadable images exceeds ``max_corrupt``.
    """
    corrupt, done = CorruptImages(max_corrupt), 0

    def count(batch: Batch) -> None:
        nonlocal done
        corrupt.add(batch.corrupt)
        done += len(batch.targets) + len(batch.corrupt)
        if on_batch is not None:
            on_batch(done, images)

    was_training = model.training
    for loader, mapping in zip(loaders, columns, strict=True):
        score(model, loader, scores, device=device, columns=mapping, on_batch=count)
    model.train(was_training)
    return corrupt.lines


def resolve_device(device: str) -> torch.device:
    """The device; ``auto`` is the GPU if there is one. A missing GPU raises :class:`UsageError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; one of auto, cpu, cuda, cuda:INDEX") from None
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device} is not there: torch finds {torch.cuda.device_count()} GPUs; try --device cpu"
        )
    return made


def evaluate(
    checkpoint: PromptModel | str | Path,
    data: Data | None = None,
    *,
    split: str | None = None,
    data_root: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    max_corrupt: int | None = None,
    backbone: Backbone | None = None,
    weights: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Score a prompt model on a data set, with the transform of its checkpoint, in float32.

    Args:
        checkpoint: a model, or the folder of a checkpoint.
        data: a data set as in ``train``, or an image source. None uses the images that the run in ``checkpoint`` held
            out, see :mod:`prompttune.training.held_out`.
        split: ``val``, ``test``, ``train`` or ``all``; None uses ``val``, else ``test``, else the whole data set. A
            data set without splits only has ``all``. Ignored for an image source.
        data_root: see ``TrainConfig.data_root``; None, also for ``seed``, ``limit`` and ``max_corrupt``, uses the run's
            value if the data are the run's, else the default.
        seed: seed of the selection for ``limit``.
        limit: largest number of images in each split.
        batch_size: number of images in a forward pass.
        workers: number of loader processes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        max_corrupt: number of unreadable images to tolerate.
        backbone: a loaded backbone to use; None loads the checkpoint's.
        weights: source of the backbone's weights, if it differs from that of the training.
        on_batch: called with the number of finished images and of all images, also while held-out images are checked.

    Returns:
        The figures. Classes are matched by name: images of a class that the model does not have count as wrong.

    Raises:
        UsageError: the split or device is unknown, or a model is given without data.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data cannot be read or lack the split, data and model share no class, or a held-out image is
            missing or has changed.
    """
    place = resolve_device(device)
    data = data if data is None or is_source(data) else settled(data)
    settings = data_settings(checkpoint, data, {"data_root": data_root, "seed": seed, "max_corrupt": max_corrupt})
    chosen = choose_images(checkpoint, data, split, settings, limit=limit, on_image=on_batch)
    model = opened(checkpoint, backbone, weights).to(place)
    matched = match_classes(chosen.sources, model.labels)
    scores, transform = Scores(len(model.labels), matched.unseen), model.preprocess.transform()
    loaders = [
        make_loader(source, transform, batch_size=batch_size, shuffle=False, seed=0, workers=workers)
        for source in chosen.sources
    ]
    columns = [torch.from_numpy(one) for one in matched.columns]
    images = sum(map(len, chosen.sources))
    corrupt = score_all(
        model, loaders, images, scores,
        device=place, max_corrupt=settings["max_corrupt"], columns=columns, on_batch=on_batch,
    )  # fmt: skip
    return dataclasses.replace(scores.result(matched.labels, corrupt), chosen=chosen)


def opened(checkpoint: PromptModel | str | Path, backbone: Backbone | None, weights: str | None) -> PromptModel:
    """The given model, or the model of a checkpoint's folder."""
    if isinstance(checkpoint, PromptModel):
        return checkpoint
    return PromptModel.load(checkpoint, backbone=backbone, weights=weights)
