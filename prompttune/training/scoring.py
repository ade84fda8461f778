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

from prompttune.data import Batch, CorruptImages, EpochLoader, ImageSource, load_data, loading, make_loader
from prompttune.errors import DataError, UsageError, choose
from prompttune.evaluation.result import Evaluation
from prompttune.evaluation.tally import Tally
from prompttune.model import PromptModel

if TYPE_CHECKING:
    from prompttune.backbones import Backbone

SPLITS = ("val", "train", "all")


@dataclass(frozen=True, eq=False)
class EvaluationResult(Evaluation):
    """An evaluation of a model: all logits were seen, so no figure is unknown."""

    top5: float
    loss: float
    """Mean cross entropy, in nats; NaN if a logit was not finite."""
    corrupt: tuple[str, ...] = ()
    """One line for each image that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**super().to_dict(), "corrupt": list(self.corrupt)}


class Scores:
    """Sums over batches of tensors; those of several processes add up."""

    def __init__(self, classes: int) -> None:
        self.tally = Tally(classes)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, C], class indices [B]."""
        self.tally.add_logits(logits.float().cpu().numpy(), targets.cpu().numpy())

    def result(
        self, labels: Sequence[str], corrupt: Sequence[str] = (), reduce: Callable[[Tensor], Tensor] | None = None
    ) -> EvaluationResult:
        """The figures; ``reduce`` sums a tensor over the processes.

        Raises:
            DataError: there was no image.
        """
        whole = self.tally
        if reduce is not None:
            whole = Tally(self.tally.classes)
            whole.merge({name: reduce(torch.from_numpy(part)).numpy() for name, part in self.tally.arrays().items()})
        result = whole.result(labels)
        values = {one.name: getattr(result, one.name) for one in dataclasses.fields(result)}
        return EvaluationResult(**values, corrupt=tuple(corrupt))


class Sums(Protocol):
    """Where the answers to batches are counted."""

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
    """Run the base pathway over batches and add them to ``scores``.

    Args:
        model: left in evaluation mode.
        batches: images [B, 3, S, S] and class indices [B] of the data, or masks of them.
        scores: where to count.
        device: where the model stands.
        columns: the model's class of each class of the data, [classes of the data]; None if they are the same.
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
    columns: Tensor | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """:func:`score` over loaders of so many ``images`` in all; the model keeps its mode.

    Args:
        model, scores, device, columns: see :func:`score`.
        loaders: one a source.
        images: of all of them, for the progress.
        max_corrupt: unreadable images that are tolerated.
        on_batch: called with the images done and the images to do.

    Returns:
        One line for each image that could not be read.

    Raises:
        DataError: more images than ``max_corrupt`` cannot be read.
    """
    corrupt, done = CorruptImages(max_corrupt), 0

    def count(batch: Batch) -> None:
        nonlocal done
        corrupt.add(batch.corrupt)
        done += len(batch.targets) + len(batch.corrupt)
        if on_batch is not None:
            on_batch(done, images)

    was_training = model.training
    for loader in loaders:
        score(model, loader, scores, device=device, columns=columns, on_batch=count)
    model.train(was_training)
    return corrupt.lines


def match_classes(classes: Sequence[str], labels: Sequence[str]) -> Tensor | None:
    """The model's index of each class of the data, [classes]; None if the two lists are the same.

    Raises:
        DataError: the names differ; the message names the differences.
    """
    if list(classes) == list(labels):
        return None
    missing, extra = sorted(set(labels) - set(classes)), sorted(set(classes) - set(labels))
    if missing or extra:
        parts = [f"only in the data: {_shortened(extra)}"] if extra else []
        parts += [f"only in the checkpoint: {_shortened(missing)}"] if missing else []
        raise DataError(f"the classes of the data are not the checkpoint's; {'; '.join(parts)}")
    index = {label: position for position, label in enumerate(labels)}
    return torch.tensor([index[name] for name in classes])


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU if there is one; a GPU that is not there raises :class:`UsageError`."""
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
    data: str | ImageSource,
    *,
    split: str = "val",
    data_root: str | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    max_corrupt: int = 10,
    backbone: Backbone | None = None,
    weights: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Score a prompt model on a data set, with the transform that the checkpoint names, in float32.

    Args:
        checkpoint: a model, or the folder of a checkpoint.
        data: a data set as ``train`` takes it, or an image source.
        split: ``val``, ``train`` or ``all``; ignored for an image source.
        data_root: see ``TrainConfig.data_root``, as are ``val_fraction``, ``seed``, ``limit`` and ``max_corrupt``;
            the same fraction and seed as in training give the same validation images.
        val_fraction: share held out where the data names no validation split.
        seed: seed of that split.
        limit: use at most so many images.
        batch_size: images of a forward pass.
        workers: loader processes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        max_corrupt: unreadable images that are tolerated.
        backbone: a loaded backbone to use, None to load the checkpoint's.
        weights: where to take the backbone's weights from instead.
        on_batch: called with the images done and the images to do.

    Raises:
        UsageError: an unknown split or device.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data cannot be read, or its classes are not the model's.
    """
    choose("split", split, SPLITS)
    place = resolve_device(device)
    sources = _sources(data, split, val_fraction=val_fraction, seed=seed, root=data_root, limit=limit)
    model = (
        checkpoint
        if isinstance(checkpoint, PromptModel)
        else PromptModel.load(checkpoint, backbone=backbone, weights=weights)
    ).to(place)
    columns = match_classes(sources[0].classes, model.labels)
    scores, transform = Scores(len(model.labels)), model.preprocess.transform()
    loaders = [
        make_loader(source, transform, batch_size=batch_size, shuffle=False, seed=seed, workers=workers)
        for source in sources
    ]
    images = sum(len(source) for source in sources)
    corrupt = score_all(
        model, loaders, images, scores,
        device=place, max_corrupt=max_corrupt, columns=columns, on_batch=on_batch,
    )  # fmt: skip
    return scores.result(model.labels, corrupt)


def _sources(data: str | ImageSource, split: str, **settings: Any) -> list[ImageSource]:
    if not isinstance(data, str):
        return [data]
    splits = load_data(data, **settings)
    return {"val": [splits.val], "train": [splits.train], "all": [splits.train, splits.val]}[split]
