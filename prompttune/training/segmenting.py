"""What training and evaluation do differently for a segmentation: loss, scores, data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.data.mask_loading import make_mask_loader
from prompttune.data.mask_transforms import JointTransform
from prompttune.data.masks import MaskSource, load_masks
from prompttune.errors import DataError, UsageError, choose
from prompttune.evaluation.segmentation import PixelTally, SegmentationEvaluation
from prompttune.model import PromptModel
from prompttune.segmentation.config import IGNORE_INDEX
from prompttune.training.scoring import SPLITS, resolve_device, score_all

if TYPE_CHECKING:
    from prompttune.backbones import Backbone


def at_mask_size(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, C, h, w] brought to the size of the masks [B, H, W] by bilinear interpolation, float32."""
    return F.interpolate(logits.float(), size=targets.shape[1:], mode="bilinear", align_corners=False)


class PixelCriterion(nn.Module):
    """Mean cross entropy of the pixels that have a class, at the masks' size; 0 where none has."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A scalar, in nats, of logits [B, C, h, w] and masks [B, H, W]."""
        total = F.cross_entropy(
            at_mask_size(logits, targets),
            targets,
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def right_pixels(logits: Tensor, targets: Tensor) -> Tensor:
    """Over the batch, the sum of each image's share of right pixels among those that have a class."""
    known = targets != IGNORE_INDEX
    right = (at_mask_size(logits, targets).argmax(dim=1) == targets) & known
    shares: Tensor = right.flatten(1).sum(dim=1) / known.flatten(1).sum(dim=1).clamp(min=1)
    return shares.sum()


class PixelScores:
    """Sums over batches of tensors; those of several processes add up."""

    def __init__(self, classes: int) -> None:
        self.tally = PixelTally(classes)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits [B, C, h, w], masks [B, H, W]."""
        resized = at_mask_size(logits, targets)
        loss = F.cross_entropy(resized, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        self.tally.add(resized.argmax(dim=1).cpu().numpy(), targets.cpu().numpy(), float(loss))

    def result(
        self, labels: Sequence[str], corrupt: Sequence[str] = (), reduce: Callable[[Tensor], Tensor] | None = None
    ) -> SegmentationEvaluation:
        """The figures; ``reduce`` sums a tensor over the processes.

        Raises:
            DataError: no pixel had a class.
        """
        if reduce is None:
            return self.tally.result(labels, corrupt)
        whole = PixelTally(self.tally.classes)
        for name, part in self.tally.sums.items():
            whole.sums[name] = reduce(torch.from_numpy(part)).numpy()
        return whole.result(labels, corrupt)


def evaluate_segmentation(
    checkpoint: PromptModel | str | Path,
    data: str | MaskSource,
    *,
    split: str = "val",
    data_root: str | None = None,
    reduce_zero_label: bool = True,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: str = "auto",
    max_corrupt: int = 10,
    backbone: Backbone | None = None,
    weights: str | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> SegmentationEvaluation:
    """Score a segmentation on a data set of masks, in float32, at the size of the model's input.

    Image and mask go through the transform that the checkpoint names, the mask with the nearest pixel; logits are
    interpolated to its size. Published figures of ADE20K are mostly taken at each image's own size instead.

    Args:
        checkpoint: a model, or the folder of a checkpoint.
        data: a data set as :func:`load_masks` takes it, or a source.
        split: ``val``, ``train`` or ``all``; ignored for a source.
        data_root: see :func:`load_masks`, as are ``reduce_zero_label``, ``seed`` and ``limit``.
        reduce_zero_label: in a folder, number 0 is no class.
        seed: seed of the choice that ``limit`` makes.
        limit: use at most so many images of each split.
        batch_size: images of a forward pass.
        workers: loader processes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
        max_corrupt: unreadable images that are tolerated.
        backbone: a loaded backbone to use, None to load the checkpoint's.
        weights: where to take the backbone's weights from instead.
        on_batch: called with the images done and the images to do.

    Raises:
        UsageError: an unknown split or device, or the checkpoint is no segmentation.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data cannot be read, or its classes are not the model's.
    """
    choose("split", split, SPLITS)
    place = resolve_device(device)
    if isinstance(data, str):
        found = load_masks(data, root=data_root, limit=limit, seed=seed, reduce_zero_label=reduce_zero_label)
        sources = {"val": [found.val], "train": [found.train], "all": [found.train, found.val]}[split]
    else:
        sources = [data]
    if not isinstance(checkpoint, PromptModel):
        checkpoint = PromptModel.load(checkpoint, backbone=backbone, weights=weights)
    model = checkpoint.to(place)
    if model.segmentation is None:
        raise UsageError("the checkpoint is a classification: give images with a class each")
    for source in sources:
        check_same_labels(source.classes, model.labels)
    scores, joint = PixelScores(len(model.labels)), JointTransform(model.preprocess)
    loaders = [
        make_mask_loader(source, joint, batch_size=batch_size, shuffle=False, seed=seed, workers=workers)
        for source in sources
    ]
    images = sum(len(source) for source in sources)
    corrupt = score_all(model, loaders, images, scores, device=place, max_corrupt=max_corrupt, on_batch=on_batch)
    return scores.result(model.labels, corrupt)


def check_same_labels(classes: Sequence[str], labels: Sequence[str]) -> None:
    """Raise :class:`DataError` unless the data's classes are the model's, in the same order."""
    if list(classes) != list(labels):
        raise DataError(
            f"the classes of the data are not the checkpoint's: {len(classes)} ({', '.join(classes[:5])} ...) "
            f"against {len(labels)} ({', '.join(labels[:5])} ...)"
        )
