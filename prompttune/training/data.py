"""Former name of :mod:`prompttune.data`, for scripts that still import it."""

from prompttune.data import (
    Batch,
    CorruptImages,
    DataSplits,
    EpochLoader,
    FileSource,
    ImageSource,
    Subset,
    load_data,
    make_loader,
    on_device,
)

__all__ = [
    "Batch",
    "CorruptImages",
    "DataSplits",
    "EpochLoader",
    "FileSource",
    "ImageSource",
    "Subset",
    "load_data",
    "make_loader",
    "on_device",
]
