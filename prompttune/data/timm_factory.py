"""Data sets of timm's factory: torchvision's, and those of Hugging Face ``datasets``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset

from prompttune.data.base import ImageSource, LabelledSource, Parts, numbered
from prompttune.data.folder import read_folder
from prompttune.data.objects import DatasetSource
from prompttune.data.split_names import ALL, TRAIN, VAL, split_of
from prompttune.data.text import nfc
from prompttune.errors import DataError, MissingExtraError, UsageError, shortened
from prompttune.images import read_image

logger = logging.getLogger("prompttune")

FOLDER_NAMES = ("image_folder", "folder")
"""timm's names for torchvision's ``ImageFolder``."""


class HubSource(LabelledSource):
    """A split of a Hugging Face data set, read through timm's reader."""

    def __init__(self, reader: Any, labels: Sequence[int], classes: Sequence[str], name: str) -> None:
        super().__init__(labels, classes, name)
        self.reader = reader

    def image(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        try:
            # timm's data set would replace an unreadable image by the next one; its reader does not
            stream = self.reader[index][0]
        except (AssertionError, TypeError):
            raise OSError("the row has no image") from None
        with stream:
            return read_image(stream)

    def describe(self, index: int) -> str:
        """Name, split and index, and the path if the data set keeps one."""
        try:
            path = self.reader.filename(index, absolute=True)
        except TypeError:
            path = None
        return super().describe(index) + (f" ({path})" if path else "")


def load_torch(name: str, root: str | None) -> Parts:
    """Load torchvision's data set ``name`` from ``root``; download it first if it is missing.

    ``image_folder`` reads ``root`` itself like any other folder.

    Raises:
        UsageError: the name is unknown, or ``root`` is missing.
        DataError: the data cannot be found, downloaded or read.
    """
    if root is None:
        raise UsageError(f"torch/{name} needs the folder that the data are kept in: give --data-root")
    place = Path(root).expanduser()
    if name.lower() in FOLDER_NAMES:
        return read_folder(place)
    train, held = (_torch_split(name, place, split) for split in ("train", "validation"))
    return Parts({TRAIN: train, VAL: held}, f"torch/{name} in {place}")


def _torch_split(name: str, root: Path, split: str) -> DatasetSource:
    try:
        dataset = create_dataset(f"torch/{name}", root=str(root), split=split, download=True)
    except AssertionError as problem:
        raise UsageError(f"{problem}; timm knows cifar10, cifar100, mnist, image_folder and others") from None
    except (OSError, RuntimeError, ValueError) as problem:
        raise DataError(f"cannot load torch/{name}, {split}, from {root}: {' '.join(str(problem).split())}") from None
    return DatasetSource(dataset, f"torch/{name}/{split}")


def load_hfds(name: str, root: str | None) -> Parts:
    """Load the Hugging Face data set ``name``, or a local folder ``name``; ``root`` is the cache.

    The image and the label are in the columns with these names, else in the only columns of their type. A split whose
    images lack labels is skipped with a warning if another split has them.

    Raises:
        MissingExtraError: the library is not installed.
        DataError: the data cannot be found, downloaded or read, or lack an image or a label column, or the splits
            cannot be told apart.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    try:
        loaded = datasets.load_dataset(name, cache_dir=root)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise DataError(f"cannot load hfds/{name}: {' '.join(str(problem).split())}") from None
    splits = _hfds_splits(list(loaded), f"hfds/{name}")
    features = loaded[next(iter(splits.values()))].features
    columns = {
        "input_key": _column(features, "image", datasets.Image, name),
        "target_key": _column(features, "label", datasets.ClassLabel, name),
    }
    readers = {
        split: create_dataset(f"hfds/{name}", root=root, split=theirs, **columns).reader
        for split, theirs in splits.items()
    }
    return Parts(_hfds_sources(readers, splits, columns["target_key"], f"hfds/{name}"), f"hfds/{name}")


def _hfds_splits(names: list[str], where: str) -> dict[str, str]:
    """The data set's own name for each of its splits."""
    if len(names) == 1 and split_of(names[0]) is None:
        return {ALL: names[0]}
    found: dict[str, str] = {}
    for name in names:
        if (split := split_of(name)) is None:
            logger.warning("%s: the split %s is not used: its name is that of no usual split", where, name)
        elif split in found:
            raise DataError(f"the splits {found[split]} and {name} of {where} mean the same")
        else:
            found[split] = name
    if not found:
        raise DataError(f"{where} has the splits {shortened(names)}, none of which is called train, val or test")
    return found


def _column(features: Any, usual: str, kind: type[Any], name: str) -> str:
    """The column with the usual name, else the only one of a type."""
    if usual in features:
        return usual
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        raise DataError(f"hfds/{name} has no column {usual!r}, and {len(fitting)} others that could be it; "
                        f"its columns: {shortened(list(features), limit=12)}")  # fmt: skip
    return str(fitting[0])


def _hfds_sources(
    readers: Mapping[str, Any], names: Mapping[str, str], column: str, where: str
) -> dict[str, ImageSource]:
    """One source per split, all with the same classes."""
    values = {split: list(reader.dataset[column]) for split, reader in readers.items()}
    unlabelled = [split for split, part in values.items() if any(value is None or value == -1 for value in part)]
    for split in unlabelled:
        what = f"{where} has images without a label in its split {names[split]}"
        if split in (ALL, TRAIN) or len(values) == 1:
            raise DataError(what)
        logger.warning("%s: it is not used", what)
        del values[split]
    every = [value for part in values.values() for value in part]
    classes, index = _classes(every, next(iter(readers.values())).class_to_idx, where)
    return {
        split: HubSource(readers[split], [index[value] for value in part], classes, f"{where}/{names[split]}")
        for split, part in values.items()
    }


def _classes(values: Sequence[Any], class_to_idx: dict[str, int], name: str) -> tuple[list[str], dict[Any, int]]:
    """Class names, and the class index of every value in the label column."""
    if class_to_idx:
        classes = [nfc(name) for name in sorted(class_to_idx, key=class_to_idx.__getitem__)]
    elif all(isinstance(value, int) and value >= 0 for value in values):
        classes = numbered(values)
    elif all(isinstance(value, str) for value in values):
        classes = sorted({nfc(value) for value in values})
        return classes, {value: classes.index(nfc(value)) for value in set(values)}
    else:
        raise DataError(f"the labels of {name} are neither class indices nor names")
    return classes, {number: number for number in range(len(classes))}
