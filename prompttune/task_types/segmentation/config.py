"""Segmentation: a class for each place of an image, from the maps of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.data.base import DataObject
from prompttune.errors import BackboneError, DataError, UsageError, choose
from prompttune.images.augment import Augment
from prompttune.images.joint import JointTransform
from prompttune.images.masks import IGNORE_INDEX
from prompttune.images.preprocess import Preprocess
from prompttune.task_types.base import Head, Measures, TaskType
from prompttune.task_types.segmentation.figures import PixelScores, SegmentationEvaluation, at_mask_size
from prompttune.task_types.segmentation.heads import LinearHead
from prompttune.task_types.segmentation.pyramid import PYRAMID_LEVELS, PyramidHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prompttune.evaluation.scored import Matched

HEADS = ("linear", "pyramid")
STRIDE = 4
"""Pixels of the input per value of the logits' map, in both directions."""
MAX_CHANNELS = 4096
"""Largest number of channels of the pyramid head, whose parameters grow with their square."""


@dataclass(frozen=True)
class SegmentationConfig(TaskType):
    """A class for each place of an image.

    Raises:
        UsageError: the head is unknown, or the number of channels is out of range.
    """

    name: ClassVar[str] = "segmentation"
    summary: ClassVar[str] = "a class for each place of an image"
    measures: ClassVar[Measures] = Measures(
        "miou", "mIoU", "pixel_accuracy", "pixel_accuracy", "pixel accuracy", "pixel accuracy"
    )
    heads: ClassVar[tuple[str, ...]] = HEADS
    target: ClassVar[Literal["class", "mask"]] = "mask"
    target_axes: ClassVar[tuple[str, ...]] = ("height", "width")
    rounding_ties: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...] | None] = ("onnx",)
    entry: ClassVar[str] = "segmentation"
    refused: ClassVar[Mapping[str, str]] = {
        "predict": "call segment(), which gives a class to each pixel",
        "server": "the server does not answer such tasks; prompttune infer writes masks, Engine.segment returns them",
        "bench": "prompttune bench does not time such tasks; prompttune infer reports their speed",
        "triton": "a Triton repository answers classifications; export an engine instead",
        "report": "--report is for classifications; use --output for the figures of a segmentation",
        "labels": "--labels is for classifications; leave it out",
        "smooth": "--smooth is for classifications; leave it out",
        "ray": "--executor ray is for classifications; leave it out",
    }

    head: str = "linear"
    """Head: ``linear`` reads the last block's patch tokens; ``pyramid`` those of four depths, as UPerNet does."""
    channels: int = 64
    """Number of channels of the pyramid head; the linear head does not use it."""

    def __post_init__(self) -> None:
        choose("head", self.head, HEADS)
        # The type is checked too: checkpoints from elsewhere may hold any value.
        if type(self.channels) is not int or not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"a pyramid head needs from 1 to {MAX_CHANNELS} channels, not {self.channels!r}")

    def levels(self, depth: int) -> tuple[int, ...]:
        """Blocks whose patch tokens the head reads: the last one, or four that are evenly spread up to it.

        Raises:
            UsageError: the backbone has too few blocks.
        """
        if self.head == "linear":
            return (depth - 1,)
        if depth < PYRAMID_LEVELS:
            raise UsageError(f"the pyramid head reads {PYRAMID_LEVELS} blocks, the backbone has {depth}: use linear")
        return tuple(-(-(number + 1) * depth // PYRAMID_LEVELS) - 1 for number in range(PYRAMID_LEVELS))

    def graph_settings(self) -> dict[str, Any]:
        """The settings that all tasks of an engine must share."""
        return {"head": self.head} | ({"channels": self.channels} if self.head == "pyramid" else {})

    @classmethod
    def chosen(cls, head: str, channels: int) -> SegmentationConfig:
        """See :class:`TaskType`."""
        return cls(head, channels)

    def to_config(self) -> dict[str, Any]:
        """See :class:`TaskType`."""
        return {self.entry: self.to_dict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SegmentationConfig:
        """See :class:`TaskType`."""
        return cls(**config[cls.entry])

    def transform(self, preprocess: Preprocess, augment: Augment | None = None) -> JointTransform:
        """See :class:`TaskType`: geometry changes the mask too."""
        return JointTransform(preprocess, augment)

    def pair(self, preprocess: Preprocess) -> JointTransform:
        """See :class:`TaskType`."""
        return JointTransform(preprocess)

    def columns(self, matched: Matched) -> list[NDArray[np.int64]]:
        """The class index for each value of the masks of each source, as [256].

        Raises:
            DataError: model and data together have more classes than a mask can hold.
        """
        if (count := len(matched.labels)) > IGNORE_INDEX:
            raise DataError(f"model and data have {count} classes together, masks tell {IGNORE_INDEX} apart")
        tables = [np.full(IGNORE_INDEX + 1, IGNORE_INDEX) for _ in matched.columns]
        for table, columns in zip(tables, matched.columns, strict=True):
            table[: len(columns)] = columns
        return tables

    def check_method(self, method: Any, name: str, backbone: Backbone) -> None:
        """See :class:`TaskType`."""
        if not method.gives_maps:
            raise BackboneError(
                f"segmentation: method {name} gives no maps of patch tokens on {type(backbone).__name__}; "
                "docs/segmentation.md names those that do"
            )

    def make_head(self, backbone: Backbone, classes: int, width: int) -> Head:  # noqa: ARG002
        """See :class:`TaskType`.

        Raises:
            UsageError: more classes than a mask can tell apart.
        """
        if classes > IGNORE_INDEX:
            raise UsageError(f"a mask tells at most {IGNORE_INDEX} classes apart, not {classes}")
        size = output_size(backbone.image_size)
        if self.head == "linear":
            return LinearHead(backbone.width, backbone.grid, size, classes)
        return PyramidHead(backbone.width, backbone.grid, size, classes, self.channels)

    def check_data(self, data: Any) -> None:
        """See :class:`TaskType`."""
        if isinstance(data, DataObject):
            raise UsageError("segmentation: data must be a folder or a built-in, not an object")

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        class_weights: Tensor | None = None,  # noqa: ARG002
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross entropy, in nats, of the pixels with a class, at the masks' size; 0 if there are none.

        Args:
            logits: [B, C, h, w].
            targets: masks [B, H, W].
            class_weights: not used.
            label_smoothing: share of the target that is spread over all classes.
        """
        shared: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing}
        total = F.cross_entropy(at_mask_size(logits, targets), targets, reduction="sum", **shared)
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def hits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch of each image's share of right pixels among those with a class."""
        known = targets != IGNORE_INDEX
        right = (at_mask_size(logits, targets).argmax(dim=1) == targets) & known
        shares: Tensor = right.flatten(1).sum(dim=1) / known.flatten(1).sum(dim=1).clamp(min=1)
        return shares.sum()

    def figure(self, result: SegmentationEvaluation) -> Figure:
        """The confusion matrix, each row divided by the pixels of its class."""
        from prompttune.evaluation.plots import draw_confusion

        return draw_confusion(result.confusion, result.labels, unit="pixels")

    def scores(self, classes: int, unseen: int = 0) -> PixelScores:
        """See :class:`TaskType`."""
        return PixelScores(classes, unseen)


def output_size(image_size: int) -> tuple[int, int]:
    """Height and width of the logits' map: the input's divided by :data:`STRIDE`, rounded up."""
    side = -(-image_size // STRIDE)
    return side, side
