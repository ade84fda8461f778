"""Features of a data set: the output of a model or a plain backbone for every image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.data import CorruptImages, ImageSource, load_parts, make_loader
from prompttune.data.objects import Data, settled
from prompttune.errors import DataError, UsageError
from prompttune.evaluation.scored import choose_split
from prompttune.images.preprocess import Preprocess
from prompttune.model import PromptModel
from prompttune.training.scoring import resolve_device


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of N images, in the order of the data."""

    features: NDArray[np.float32]
    """[N, D]."""
    labels: NDArray[np.int64]
    """Class index of each image, [N]."""
    names: list[str]
    """Origin of each image: a path, or a name such as ``demo/digits/val[17]``."""
    classes: list[str]
    """Names of the classes, by index."""
    corrupt: list[str]
    """One line for each image that was left out because it could not be read."""


def features(
    model: PromptModel | Backbone | str | Path,
    data: Data,
    *,
    split: str = "all",
    data_root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    max_corrupt: int = 10,
    on_batch: Callable[[int, int], None] | None = None,
) -> ImageFeatures:
    """Pooled features of every image of a data set, in evaluation transform, float32 and without gradients.

    Args:
        model: a model, the folder of a checkpoint, or a plain backbone with its own transform. It is moved to the
            device and keeps its training mode.
        data: a data set as ``train`` takes it, or an image source.
        split: ``train``, ``val``, ``test`` or ``all``.
        data_root: see ``TrainConfig.data_root``.
        limit: largest number of images in each split, with every class represented.
        seed: seed of the selection for ``limit``.
        batch_size: number of images in a forward pass.
        workers: number of loader processes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        max_corrupt: number of unreadable images to tolerate.
        on_batch: called with the number of finished images and of all images.

    Raises:
        UsageError: the device or split is unknown.
        DataError: the data cannot be read, do not have the split, or have more than ``max_corrupt`` unreadable images.
    """
    place = resolve_device(device)
    parts = load_parts(settled(data), root=data_root, limit=limit, seed=seed)
    chosen = choose_split(parts.named, parts.name, split)
    if isinstance(model, str | Path):
        model = PromptModel.load(model)
    elif not isinstance(model, PromptModel | Backbone):
        raise UsageError(f"features are those of a model, a checkpoint folder or a backbone, not of {model!r:.80}")
    mode = model.to(place).training
    preprocess = model.preprocess if isinstance(model, PromptModel) else model.default_preprocess()
    try:
        return extract(
            _pooled(model.eval()), preprocess, chosen.sources,
            device=place, batch_size=batch_size, workers=workers, max_corrupt=max_corrupt, on_batch=on_batch,
        )  # fmt: skip
    finally:
        model.train(mode)


@torch.no_grad()
def _pooled(model: PromptModel | Backbone) -> Callable[[Tensor], Tensor]:
    if isinstance(model, Backbone):
        return model
    state = model.task_state()  # once, not for every batch
    return lambda images: model.forward_state(images, state).features


@torch.no_grad()
def extract(
    pooled: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    sources: Sequence[ImageSource],
    *,
    device: torch.device,
    batch_size: int,
    workers: int = 0,
    max_corrupt: int = 10,
    on_batch: Callable[[int, int], None] | None = None,
) -> ImageFeatures:
    """:func:`features` of several sources, one after the other, with classes joined by name.

    Args:
        pooled: function from normalised images [B, 3, S, S] on ``device`` to features [B, D].
        preprocess: the evaluation transform.
        sources: the images.
        device, batch_size, workers, max_corrupt, on_batch: see :func:`features`.

    Raises:
        DataError: more than ``max_corrupt`` images are unreadable, or all of them.
    """
    classes = list(dict.fromkeys(name for source in sources for name in source.classes))
    found, labels, names, done = [], [], [], 0
    corrupt, total = CorruptImages(max_corrupt), sum(map(len, sources))
    for source in sources:
        number = np.array([classes.index(name) for name in source.classes], dtype=np.int64)
        loader = make_loader(
            source, preprocess.transform(), batch_size=batch_size, shuffle=False, seed=0, workers=workers
        )
        start = 0
        for batch in loader:
            corrupt.add(batch.corrupt)
            stop = start + len(batch.targets) + len(batch.corrupt)
            names += [source.describe(start + place) for place in batch.places]
            if len(batch.targets):
                found.append(pooled(batch.images.to(device)).float().cpu().numpy())
                labels.append(number[batch.targets.numpy()])
            done, start = done + stop - start, stop
            if on_batch is not None:
                on_batch(done, total)
    if not found:
        raise DataError(f"none of the {total} images can be read")
    return ImageFeatures(np.concatenate(found), np.concatenate(labels), names, classes, corrupt.lines)
