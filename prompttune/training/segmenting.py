"""Parts of training and evaluation that differ for a segmentation: loss, scores, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from prompttune.data import ImageSource, make_loader
from prompttune.errors import DataError, UsageError
from prompttune.evaluation.scored import Matched, match_classes
from prompttune.evaluation.segmentation import PixelTally, SegmentationEvaluation
from prompttune.images.joint import JointTransform
from prompttune.images.masks import IGNORE_INDEX
from prompttune.model import PromptModel
from prompttune.training.own_data import choose_images, data_settings
from prompttune.training.scoring import opened, resolve_device, score_all

if TYPE_CHECKING:
    from prompttune.backbones import Backbone


def at_mask_size(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, C, h, w] interpolated bilinearly to the size of the masks [B, H, W], float32."""
    return F.interpolate(logits.float(), size=targets.shape[1:], mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of the pixels with a class, at the masks' size; 0 if there are none.

    The result is a scalar, in nats, for logits [B, C, h, w] and masks [B, H, W].
    """
    total = F.cross_entropy(
        at_mask_size(logits, targets),
        targets,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def right_pixels(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the batch of each image's share of right pixels among those with a class."""
    known = targets != IGNORE_INDEX
    right = (at_mask_size(logits, targets).argmax(dim=1) == targets) & known
    shares: Tensor = right.flatten(1).sum(dim=1) / known.flatten(1).sum(dim=1).clamp(min=1)
    return shares.sum()


class PixelScores:
    """Sums over batches of tensors; the sums of several processes can be added."""

    def __init__(self, classes: int, unseen: int = 0) -> None:
        self.tally = PixelTally(classes, unseen)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, C, h, w], masks [B, H, W]."""
        resized = at_mask_size(logits, targets)
        learnt = targets.where(targets < self.tally.classes, IGNORE_INDEX)
        loss = F.cross_entropy(resized, learnt, ignore_index=IGNORE_INDEX, reduction="sum")
        self.tally.add(resized.argmax(dim=1).cpu().numpy(), targets.cpu().numpy(), float(loss))

    def result(
        self, labels: Sequence[str], corrupt: Sequence[str] = (), reduce: Callable[[Tensor], Tensor] | None = None
    ) -> SegmentationEvaluation:
        """The figures; ``reduce`` sums a tensor over the processes.

        Raises:
            DataError: all pixels lack a class.
        """
        if reduce is None:
            return self.tally.result(labels, corrupt)
        whole = PixelTally(self.tally.classes, self.tally.rows - self.tally.classes)
        for name, part in self.tally.sums.items():
            whole.sums[name] = reduce(torch.from_numpy(part)).numpy()
        return whole.result(labels, corrupt)


def evaluate_segmentation(
    checkpoint: PromptModel | str | Path,
    data: str | ImageSource | None = None,
    *,
    split: str | None = None,
    data_root: str | None = None,
    reduce_zero_label: bool | None = None,
    seed: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: str = "auto",
    max_corrupt: int | None = None,
    backbone: Backbone | None = None,
    weights: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> SegmentationEvaluation:
    """Score a segmentation on a data set of masks, in float32, at the size of the model's input.

    Image and mask go through the transform of the checkpoint, the mask with the nearest pixel; logits are interpolated
    to its size. Published figures of ADE20K are mostly computed at each image's own size instead.

    Args:
        checkpoint: a model, or the folder of a checkpoint.
        data: a data set as in :func:`load_data`, or a source; None uses the images that the run held out.
        split: see :func:`prompttune.training.scoring.evaluate`.
        data_root: see :func:`load_data`.
        reduce_zero_label: whether 0 in a folder's annotations means no class; None uses the run's setting, else True.
        seed: seed of the selection for ``limit``.
        limit: largest number of images in each split.
        batch_size: number of images in a forward pass.
        workers: number of loader processes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        max_corrupt: number of unreadable images to tolerate.
        backbone: a loaded backbone to use; None loads the checkpoint's.
        weights: source of the backbone's weights, if it differs from that of the training.
        on_batch: called with the number of finished images and of all images.

    Returns:
        The figures. Classes are matched by name: pixels of a class that the model does not have count as wrong.

    Raises:
        UsageError: the split or device is unknown, or the checkpoint is not a segmentation.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: see :func:`prompttune.training.scoring.evaluate`.
    """
    place = resolve_device(device)
    given = {"data_root": data_root, "reduce_zero_label": reduce_zero_label, "seed": seed, "max_corrupt": max_corrupt}
    settings = data_settings(checkpoint, data, given)
    chosen = choose_images(checkpoint, data, split, settings, masks=True, limit=limit, on_image=on_batch)
    model = opened(checkpoint, backbone, weights).to(place)
    if model.segmentation is None:
        raise UsageError("the checkpoint is a classification: give images with a class each")
    matched = match_classes(chosen.sources, model.labels)
    scores, joint = PixelScores(len(model.labels), matched.unseen), JointTransform(model.preprocess)
    loaders = [
        make_loader(source, joint, batch_size=batch_size, shuffle=False, seed=0, workers=workers)
        for source in chosen.sources
    ]
    corrupt = score_all(
        model, loaders, sum(map(len, chosen.sources)), scores,
        device=place, max_corrupt=settings["max_corrupt"], columns=pixel_columns(matched), on_batch=on_batch,
    )  # fmt: skip
    return dataclasses.replace(scores.result(matched.labels, corrupt), chosen=chosen)


def pixel_columns(matched: Matched) -> list[Tensor]:
    """The class index for each value of the masks of each source, as [256].

    Raises:
        DataError: model and data together have more classes than a mask can hold.
    """
    if len(matched.labels) > IGNORE_INDEX:
        raise DataError(f"model and data have {len(matched.labels)} classes together, masks tell {IGNORE_INDEX} apart")
    tables = [torch.full((IGNORE_INDEX + 1,), IGNORE_INDEX) for _ in matched.columns]
    for table, columns in zip(tables, matched.columns, strict=True):
        table[: len(columns)] = torch.from_numpy(columns)
    return tables
