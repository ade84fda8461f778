"""Interface of data sets for training: an indexed source of images with named classes, in two splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from prompttune.errors import DataError, shortened
from prompttune.images import read_image
from prompttune.images.masks import IGNORE_INDEX

Target = Literal["class", "mask"]
"""What a data set knows of each image: its class, or the class of each pixel."""


class ImageSource(Protocol):
    """Images that are read by index, in an order that never changes."""

    classes: list[str]
    """Name of each class, in the order of the class indices."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """Return an RGB image and its target: a class index, or a :data:`~prompttune.images.masks.Mask` of its size.

        Raises:
            OSError, ValueError: this image or its mask cannot be read; others may be readable.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the image comes from: a path, or a name such as ``demo/digits[17]``."""
        ...

    def labels(self) -> list[int] | None:
        """Class index of every image, without decoding any; None if they are unknown, or the targets are masks."""
        ...


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on."""

    train: ImageSource
    val: ImageSource
    classes: list[str]
    name: str
    """Specification of the data set, as given by the user."""


@dataclass(frozen=True)
class Parts:
    """The splits that a data set defines itself; no image is held out."""

    named: Mapping[str, ImageSource]
    """Sources by split: some of ``train``, ``val`` and ``test``, or only ``all`` without splits. Each source has its
    own classes, some of which may lack images."""
    name: str
    """Where the images come from, for messages."""
    unfit: str | None = None
    """Reason why a model cannot be trained on them, such as an empty class folder; they can still be scored."""
    target: Target = "class"
    """Kind of the targets that the sources load."""


OBJECT = "object:"
"""Prefix of the name under which a run records that its data were a Python object."""


@dataclass(frozen=True, eq=False)
class DataObject:
    """A data set that is an object of Python, see :mod:`prompttune.data.objects`."""

    name: str
    """Name that differs between objects of another length or with other labels."""
    parts: Parts

    def __str__(self) -> str:
        return self.name


class LabelledSource(ImageSource):
    """Base of a source whose class indices are known; a subclass reads the images.

    Args:
        labels: class index of each image.
        classes: class names by index.
        name: name of the source, for :meth:`describe`.
    """

    def __init__(self, labels: Sequence[int], classes: Sequence[str], name: str = "") -> None:
        self.classes = list(classes)
        self.name = name
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Image.Image:
        """The RGB image at ``index``; raises the errors of :meth:`ImageSource.load`."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """See :class:`ImageSource`."""
        return self.image(index), self._labels[index]

    def describe(self, index: int) -> str:
        """Name and index."""
        return f"{self.name}[{index}]"

    def labels(self) -> list[int] | None:
        """See :class:`ImageSource`."""
        return list(self._labels)


class FileSource(LabelledSource):
    """Image files with one class index each.

    Args:
        paths: paths of the files.
        labels: class index of each file.
        classes: class names by index.
        root: folder of the data set.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str], root: Path) -> None:
        super().__init__(labels, classes)
        self.paths = list(paths)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        return read_image(self.paths[index])

    def files(self, index: int) -> tuple[Path, ...]:
        """The file of an image, and those of its target if it has any."""
        return (self.paths[index],)

    def describe(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])


class Subset(ImageSource):
    """Some images of a source, in the order of ``indices``."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """See :class:`ImageSource`."""
        return self.source.load(self.indices[index])

    def describe(self, index: int) -> str:
        """The source's description of the image."""
        return self.source.describe(self.indices[index])

    def labels(self) -> list[int] | None:
        """See :class:`ImageSource`."""
        labels = self.source.labels()
        return None if labels is None else [labels[index] for index in self.indices]


class Renumbered(ImageSource):
    """A source whose class indices are replaced by those in ``classes``, which names all of its classes."""

    def __init__(self, source: ImageSource, classes: Sequence[str]) -> None:
        self.source = source
        self.classes = list(classes)
        places = {name: index for index, name in enumerate(classes)}
        self._index = [places[name] for name in source.classes]

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """See :class:`ImageSource`."""
        image, target = self.source.load(index)
        if not isinstance(target, np.ndarray):
            return image, self._index[target]
        table = np.full(IGNORE_INDEX + 1, IGNORE_INDEX, dtype=np.uint8)  # class by value of a mask
        table[: len(self._index)] = self._index
        return image, table[target]

    def describe(self, index: int) -> str:
        """The source's description of the image."""
        return self.source.describe(index)

    def labels(self) -> list[int] | None:
        """See :class:`ImageSource`."""
        labels = self.source.labels()
        return None if labels is None else [self._index[label] for label in labels]


def file_at(source: ImageSource, index: int) -> tuple[Path, str] | None:
    """The file of an image, and its path relative to the data set's folder with forward slashes.

    The path is unchanged for a file outside that folder. None if the image does not have its own file.
    """
    source, index = _original(source, index)
    if not isinstance(source, FileSource):
        return None
    path = source.paths[index]
    below = path.relative_to(source.root) if path.is_relative_to(source.root) else path
    return path, below.as_posix()


def files_at(source: ImageSource, index: int) -> tuple[Path, ...]:
    """The files of an image and its target; none if the image does not have its own file."""
    source, index = _original(source, index)
    return source.files(index) if isinstance(source, FileSource) else ()


def _original(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """The source behind subsets, and the image's index in it."""
    while isinstance(source, Subset | Renumbered):
        index = source.indices[index] if isinstance(source, Subset) else index
        source = source.source
    return source, index


def numbered(labels: Sequence[int]) -> list[str]:
    """Class names "0", "1" and so on, up to the largest label."""
    return [str(number) for number in range(max(labels, default=-1) + 1)]


def check_class_count(classes: Sequence[str], where: str) -> None:
    """Raise :class:`DataError` unless there are two classes or more."""
    if len(classes) < 2:
        named = f"only one class, {classes[0]}" if classes else "no classes"
        raise DataError(f"{where} has {named}; a classifier needs two or more")


def with_classes(held: ImageSource, classes: Sequence[str], where: str) -> ImageSource:
    """The validation images, with the indices of the training classes; they may lack some classes.

    Raises:
        DataError: they have a class that training lacks; the message names the differences.
    """
    if held.classes == list(classes):
        return held
    if strange := sorted(set(held.classes) - set(classes)):
        missing = sorted(set(classes) - set(held.classes))
        parts = [f"only in training: {shortened(missing)}"] if missing else []
        parts.append(f"only in validation: {shortened(strange)}")
        raise DataError(f"the training and validation classes of {where} differ; {'; '.join(parts)}; "
                        "give both the same class names")  # fmt: skip
    return Renumbered(held, classes)
