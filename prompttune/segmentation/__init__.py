"""Semantic segmentation: heads that answer for each place of an image, using the maps of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.segmentation.config import HEADS, STRIDE, SegmentationConfig
    from prompttune.segmentation.heads import SegmentationHead

_LAZY = {
    "HEADS": "prompttune.segmentation.config",
    "STRIDE": "prompttune.segmentation.config",
    "SegmentationConfig": "prompttune.segmentation.config",
    "SegmentationHead": "prompttune.segmentation.heads",
}

__all__ = ["HEADS", "STRIDE", "SegmentationConfig", "SegmentationHead"]

__getattr__ = lazy_names(__name__, _LAZY)
