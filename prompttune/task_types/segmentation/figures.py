"""Figures of a segmentation, from one confusion matrix of pixels over all images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prompttune.errors import DataError
from prompttune.evaluation.result import Counts, Table, percent, unreadable, unseen_counts
from prompttune.evaluation.scored import Chosen, class_notes
from prompttune.images.masks import IGNORE_INDEX
from prompttune.task_types.base import Scores


@dataclass(frozen=True, eq=False)
class SegmentationEvaluation:
    """Figures of one evaluation; shares between 0 and 1. Pixels without a class are not counted."""

    labels: tuple[str, ...]
    confusion: Counts
    """Number of pixels [C, C]: true class by predicted class."""
    n: int
    """Number of scored images."""
    loss: float | None = None
    """Mean cross entropy per pixel, in nats."""
    corrupt: tuple[str, ...] | None = None
    """One line for each image that could not be read; None if this is not known."""
    unseen: int = 0
    """Number of classes that only the data have, the last of ``labels``; their pixels count as wrong."""
    chosen: Chosen | None = None
    """Which images were scored; None during a training."""

    @property
    def notes(self) -> list[str]:
        """Remarks about the images and their classes, one line each."""
        own = class_notes(self.labels, self.unseen, self.confusion.sum(axis=1).tolist(), "pixels")
        return [*(() if self.chosen is None else self.chosen.notes), *own]

    @property
    def pixels(self) -> int:
        """Number of scored pixels."""
        return int(self.confusion.sum())

    @property
    def iou(self) -> dict[str, float | None]:
        """Intersection over union of each class; None for a class without pixels and predictions."""
        right = self.confusion.diagonal()
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - right
        return {
            label: int(hits) / int(both) if both else None
            for label, hits, both in zip(self.labels, right, union, strict=True)
        }

    @property
    def miou(self) -> float:
        """Mean intersection over union of the classes with pixels or predictions."""
        return float(np.mean([one for one in self.iou.values() if one is not None]))

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels with the right class."""
        return int(self.confusion.trace()) / self.pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a loss that is not finite becomes None."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "n": self.n,
            "pixels": self.pixels,
            "iou": self.iou,
            "unseen": unseen_counts(self.labels, self.unseen, self.confusion.sum(axis=1)),
            "class_pixels": dict(zip(self.labels, self.confusion.sum(axis=1).tolist(), strict=True)),
            "confusion": self.confusion.tolist(),
            **({} if self.corrupt is None else {"corrupt": list(self.corrupt)}),
        }

    def tables(self) -> list[Table]:
        """The figures for a terminal."""
        shares = (percent(self.miou), percent(self.pixel_accuracy), f"{self.loss or 0.0:.4f}")
        pixels = self.confusion.sum(axis=1).tolist()
        rows = [[label, percent(iou), str(count)] for (label, iou), count in zip(self.iou.items(), pixels, strict=True)]
        titles = ("mIoU", "pixel accuracy", "loss", "images", "unreadable")
        whole = Table(titles, [[*shares, str(self.n), unreadable(self.corrupt)]])
        return [whole, Table(("class", "IoU", "pixels"), rows)]


def at_mask_size(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, C, h, w] interpolated bilinearly to the size of the masks [B, H, W], float32."""
    return F.interpolate(logits.float(), size=targets.shape[1:], mode="bilinear", align_corners=False)


class PixelScores(Scores):
    """See :class:`Scores`; targets are masks [B, H, W] of class indices, or ``IGNORE_INDEX``.

    Args:
        classes: number of classes C.
        unseen: number of additional classes that only the masks have; their pixels count as wrong, except in the loss.
    """

    def __init__(self, classes: int, unseen: int = 0) -> None:
        self.classes = classes
        self.rows = classes + unseen
        self.sums: dict[str, NDArray[Any]] = {
            "confusion": np.zeros((self.rows, self.rows), dtype=np.int64),
            "images": np.zeros((), dtype=np.int64),
            "loss": np.zeros((), dtype=np.float64),
        }

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits [B, C, h, w] at the size of the masks."""
        resized = at_mask_size(logits, targets)
        learnt = targets.where(targets < self.classes, IGNORE_INDEX)
        loss = F.cross_entropy(resized, learnt, ignore_index=IGNORE_INDEX, reduction="sum")
        self.count(resized.argmax(dim=1).cpu().numpy(), targets.cpu().numpy(), float(loss))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`Scores`."""
        return self.sums

    def count(self, predicted: NDArray[Any], targets: NDArray[Any], loss: float = 0.0) -> None:
        """Count the predicted class indices [B, H, W]; ``loss`` is the summed cross entropy in nats."""
        known = targets != IGNORE_INDEX
        cells = targets[known].astype(np.int64) * self.rows + predicted[known]
        counts = np.bincount(cells, minlength=self.rows**2).reshape(self.rows, self.rows)
        self.sums["confusion"] += counts
        self.sums["images"] += len(targets)
        self.sums["loss"] += loss

    def result(self, labels: Sequence[str], corrupt: Sequence[str] | None = None) -> SegmentationEvaluation:
        """See :class:`Scores`."""
        confusion: Counts = self.sums["confusion"]
        pixels = int(confusion.sum())
        if not pixels:
            raise DataError("no pixel could be scored: every image is unreadable or has no class in its mask")
        learnt = int(confusion[: self.classes].sum())
        loss = float(self.sums["loss"]) / learnt if learnt else math.nan
        unread = None if corrupt is None else tuple(corrupt)
        unseen = self.rows - self.classes
        return SegmentationEvaluation(tuple(labels), confusion, int(self.sums["images"]), loss, unread, unseen)
