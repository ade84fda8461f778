"""The module of a segmentation's head."""

from __future__ import annotations

from prompttune.backbones.base import Backbone
from prompttune.errors import UsageError
from prompttune.images.masks import IGNORE_INDEX
from prompttune.segmentation.config import SegmentationConfig, output_size
from prompttune.segmentation.heads import LinearHead, SegmentationHead
from prompttune.segmentation.pyramid import PyramidHead


def build_head(config: SegmentationConfig, backbone: Backbone, classes: int) -> SegmentationHead:
    """Make the module that holds one task's head over ``backbone``.

    Raises:
        UsageError: more classes than a mask can tell apart, or too few blocks.
    """
    if classes > IGNORE_INDEX:
        raise UsageError(f"a mask tells at most {IGNORE_INDEX} classes apart, not {classes}")
    size = output_size(backbone.image_size)
    if config.head == "linear":
        return LinearHead(backbone.width, backbone.grid, size, classes)
    return PyramidHead(backbone.width, backbone.grid, size, classes, config.channels)
