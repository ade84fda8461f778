"""What every data set is to training: an indexed source of images with named classes, in two splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from prompttune.errors import DataError
from prompttune.images import read_image

VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""Names of a split to validate on; the first that a data set has is taken."""


class ImageSource(Protocol):
    """Images that are read by index, in an order that never changes."""

    classes: list[str]
    """Name of each class, in the order of the class indices."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an RGB image and its class index.

        Raises:
            OSError, ValueError: this image cannot be read; the others may be.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the image comes from: a path, or a name such as ``demo/digits[17]``."""
        ...

    def labels(self) -> list[int] | None:
        """Class index of every image, without decoding any; None if that is not known."""
        ...


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on."""

    train: ImageSource
    val: ImageSource
    classes: list[str]
    name: str
    """The specification that it was loaded by."""


class FileSource(ImageSource):
    """Image files with a class index each."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.paths = list(paths)
        self.classes = list(classes)
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`."""
        return read_image(self.paths[index]), self._labels[index]

    def describe(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def labels(self) -> list[int]:
        """See :class:`ImageSource`."""
        return list(self._labels)


class Subset(ImageSource):
    """Some images of a source, in the order of ``indices``."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`."""
        return self.source.load(self.indices[index])

    def describe(self, index: int) -> str:
        """The source's description of the image."""
        return self.source.describe(self.indices[index])

    def labels(self) -> list[int] | None:
        """See :class:`ImageSource`."""
        labels = self.source.labels()
        return None if labels is None else [labels[index] for index in self.indices]


def check_class_count(classes: Sequence[str], where: str) -> None:
    """Raise :class:`DataError` unless there are two classes or more."""
    if len(classes) < 2:
        named = f"only one class, {classes[0]}" if classes else "no classes"
        raise DataError(f"{where} has {named}; a classifier needs two or more")


def check_same_classes(train: Sequence[str], val: Sequence[str], where: str) -> None:
    """Raise :class:`DataError` if the classes of the two splits differ; the message names the differences."""
    parts = [
        f"only in {split}: {shortened(sorted(set(mine) - set(others)))}"
        for split, mine, others in (("training", train, val), ("validation", val, train))
        if set(mine) - set(others)
    ]
    if parts:
        raise DataError(f"the training and validation classes of {where} differ; {'; '.join(parts)}; "
                        "give both the same class names")  # fmt: skip


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Names joined by commas, the first few of many."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
