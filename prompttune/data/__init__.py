"""Data: image folders, CSV tables, timm's data sets and built-ins, augmented and batched reproducibly."""

from prompttune.data.base import DataSplits, FileSource, ImageSource, Parts, Subset, file_at
from prompttune.data.loading import Batch, CorruptImages, EpochLoader, loading, make_loader, on_device
from prompttune.data.sources import load_data, load_parts
from prompttune.data.transforms import Augment

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
    "loading",
    "make_loader",
    "on_device",
]
