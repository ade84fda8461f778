"""Folders of images: one folder a class, in ``train/`` and ``val/`` or to be split."""

from __future__ import annotations

import os
from pathlib import Path

from prompttune.data.base import (
    VALIDATION_NAMES,
    DataSplits,
    FileSource,
    check_class_count,
    check_same_classes,
)
from prompttune.data.splitting import hold_out
from prompttune.errors import DataError
from prompttune.images import is_image


def load_folder(folder: Path, val_fraction: float, seed: int) -> DataSplits:
    """Read ``train/`` and ``val/`` (or ``validation/``, ``valid/``, ``test/``), or one folder of class folders.

    The latter, and a ``train/`` alone, is split by ``val_fraction``. Classes are numbered in the order of their
    names; images are found at any depth below their class folder; hidden files and folders are ignored.

    Raises:
        DataError: the folder is missing or has fewer than two classes, a class folder holds no image, the classes
            of the two splits differ, or nothing can be held out.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    train = folder / "train"
    if not _class_folders(train):
        return hold_out(_read_split(folder), val_fraction, seed, str(folder))
    for name in VALIDATION_NAMES:
        if (folder / name).is_dir():
            source, val = _read_split(train), _read_split(folder / name)
            check_same_classes(source.classes, val.classes, str(folder))
            return DataSplits(source, val, source.classes, str(folder))
    return hold_out(_read_split(train), val_fraction, seed, str(folder))


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_split(folder: Path) -> FileSource:
    found = {entry.name: _images(entry) for entry in _class_folders(folder)}
    if not found:
        raise DataError(f"{folder} has no class folders; put the images of each class into a folder of its own")
    if empty := [name for name, images in found.items() if not images]:
        raise DataError(f"class folder {folder / empty[0]} holds no image; add images or remove the folder")
    classes = list(found)
    check_class_count(classes, str(folder))
    paths = [path for images in found.values() for path in images]
    labels = [index for index, images in enumerate(found.values()) for _ in images]
    return FileSource(paths, labels, classes)


def _images(folder: Path) -> list[Path]:
    """Image files at any depth, through links, in the order of their paths."""
    images: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [Path(parent, name) for name in files if is_image(name)]
    return sorted(images)
