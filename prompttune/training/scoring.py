"""Evaluation of a prompt model, with the figures of :mod:`prompttune.evaluation`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompttune.checkpoints.format import read_config
from prompttune.data import Batch, CorruptImages, EpochLoader, make_loader
from prompttune.data.loading import loading
from prompttune.data.objects import Data, is_source, settled
from prompttune.errors import UsageError
from prompttune.evaluation.scored import match_classes
from prompttune.model import PromptModel
from prompttune.task_types import Scores, read_task_type
from prompttune.training.own_data import choose_images, data_settings

if TYPE_CHECKING:
    from prompttune.backbones import Backbone


@torch.no_grad()
def score(
    model: PromptModel,
    batches: Iterable[Batch],
    scores: Scores,
    *,
    device: torch.device,
    columns: Tensor | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_batch: Callable[[Batch], None] | None = None,
) -> None:
    """Run the base pathway over batches and add its answers to ``scores``.

    Args:
        model: the model, which is left in evaluation mode.
        batches: images [B, 3, S, S] and their targets.
        scores: counter of the answers.
        device: device of the model.
        columns: index to count each class of the data as, [classes of the data]; None if they are the model's.
        autocast: context of the forward pass.
        on_batch: called after each batch.
    """
    model.eval()
    with autocast():
        state = model.task_state()
    for batch in batches:
        if len(batch.targets):
            targets = batch.targets if columns is None else columns[batch.targets]
            with autocast():
                logits = model.forward_state(batch.images.to(device, non_blocking=True), state).logits
            scores.add(logits, targets.to(device))
        if on_batch is not None:
            on_batch(batch)


@loading()
def score_all(
    model: PromptModel,
    loaders: Sequence[EpochLoader],
    images: int,
    scores: Scores,
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
    reduce_zero_label: bool | None = None,
    backbone: Backbone | None = None,
    weights: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Any:
    """Score a prompt model on a data set, with the transform of its checkpoint, in float32.

    A segmentation is scored at the size of the model's input: the mask is resized to the nearest pixel, the logits are
    interpolated. Published figures of ADE20K are mostly computed at each image's own size instead.

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
        reduce_zero_label: whether 0 in an annotation means no class; None as for ``data_root``.
        backbone: a loaded backbone to use; None loads the checkpoint's.
        weights: source of the backbone's weights, if it differs from that of the training.
        on_batch: called with the number of finished images and of all images, also while held-out images are checked.

    Returns:
        The figures, a :class:`~prompttune.task_types.Result`: an :class:`Evaluation`, or a ``SegmentationEvaluation``.
        Classes are matched by name: images or pixels of a class that the model does not have count as wrong.

    Raises:
        UsageError: the split or device is unknown, or a model is given without data.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data cannot be read or lack the split, data and model share no class, or a held-out image is
            missing or has changed.
    """
    place = resolve_device(device)
    data = data if data is None or is_source(data) else settled(data)
    given = {"data_root": data_root, "seed": seed, "max_corrupt": max_corrupt, "reduce_zero_label": reduce_zero_label}
    settings = data_settings(checkpoint, data, given)
    kind = checkpoint.task_type if isinstance(checkpoint, PromptModel) else read_task_type(read_config(checkpoint))
    kind.check_data(data)
    chosen = choose_images(checkpoint, data, split, settings, task_type=kind, limit=limit, on_image=on_batch)
    model = opened(checkpoint, backbone, weights).to(place)
    matched = match_classes(chosen.sources, model.labels)
    scores = kind.scores(len(model.labels), matched.unseen)
    transform = kind.transform(model.preprocess)
    loaders = [
        make_loader(source, transform, batch_size=batch_size, shuffle=False, seed=0, workers=workers)
        for source in chosen.sources
    ]
    columns = [torch.from_numpy(one) for one in kind.columns(matched)]
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
