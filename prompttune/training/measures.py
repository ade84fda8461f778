"""Names of a run's figures: top-1 and top-5 for a classification, IoU and pixel accuracy for a segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measures:
    """Names of figures, as attributes of an evaluation and, after ``train_`` or ``val_``, as keys of a record."""

    score: str
    """Score that chooses the best epoch, on the validation images."""
    second: str
    """Second figure, shown next to the score."""
    train: str
    """Share of right answers, the only figure that is computed during training."""
    score_title: str
    train_title: str


CLASSIFICATION = Measures("top1", "top5", "top1", "top-1", "top-1")
SEGMENTATION = Measures("miou", "pixel_accuracy", "pixel_accuracy", "mIoU", "pixel accuracy")


def measures_of(record: Mapping[str, Any]) -> Measures:
    """The measures of an epoch's record."""
    return SEGMENTATION if f"val_{SEGMENTATION.score}" in record else CLASSIFICATION


def measures_for(task: Any) -> Measures:
    """The measures of the setting ``task``; runs from before this setting are classifications."""
    return SEGMENTATION if task == "segmentation" else CLASSIFICATION
