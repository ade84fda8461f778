"""Data: image folders, CSV tables, timm's data sets and built-ins, augmented and batched reproducibly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.data.base import DataSplits, FileSource, ImageSource, Parts, Subset, file_at
    from prompttune.data.loading import Batch, CorruptImages, EpochLoader, make_loader, on_device
    from prompttune.data.sources import load_data, load_parts
    from prompttune.images.augment import Augment

_LAZY = {
    "Augment": "prompttune.images.augment",
    "Batch": "prompttune.data.loading",
    "CorruptImages": "prompttune.data.loading",
    "DataSplits": "prompttune.data.base",
    "EpochLoader": "prompttune.data.loading",
    "FileSource": "prompttune.data.base",
    "ImageSource": "prompttune.data.base",
    "Parts": "prompttune.data.base",
    "Subset": "prompttune.data.base",
    "file_at": "prompttune.data.base",
    "load_data": "prompttune.data.sources",
    "load_parts": "prompttune.data.sources",
    "make_loader": "prompttune.data.loading",
    "on_device": "prompttune.data.loading",
}

__all__ = [
    "Augment",
    "Batch",
    "CorruptImages",
    "DataSplits",
    "EpochLoader",
    "FileSource",
    "ImageSource",
    "Parts",
    "Subset",
    "file_at",
    "load_data",
    "load_parts",
    "make_loader",
    "on_device",
]

__getattr__ = lazy_names(__name__, _LAZY)
