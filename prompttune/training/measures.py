"""What the figures of a run are called: a classification has top-1 and top-5, a segmentation IoU and pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measures:
    """Names of figures, as attributes of an evaluation and, behind ``train_`` or ``val_``, as keys of a record."""

    score: str
    """What the best epoch is chosen by, on the validation images."""
    second: str
    """Told beside it."""
    train: str
    """Share of right answers, the only one that is reckoned while training."""
    score_title: str
    train_title: str


CLASSIFICATION = Measures("top1", "top5", "top1", "top-1", "top-1")
SEGMENTATION = Measures("miou", "pixel_accuracy", "pixel_accuracy", "mIoU", "pixel accuracy")


def measures_of(record: Mapping[str, Any]) -> Measures:
    """Those of an epoch's record."""
    return SEGMENTATION if f"val_{SEGMENTATION.score}" in record else CLASSIFICATION


def measures_for(task: Any) -> Measures:
    """Those of the setting ``task``; runs from before there was one are classifications."""
    return SEGMENTATION if task == "segmentation" else CLASSIFICATION
