"""Semantic segmentation: heads that answer for each place of an image, using the maps of a method."""

from prompttune.task_types.segmentation.config import HEADS, STRIDE, SegmentationConfig
from prompttune.task_types.segmentation.heads import MapHead

__all__ = ["HEADS", "STRIDE", "MapHead", "SegmentationConfig"]
