"""Data sets that need no download: handwritten digits, and rendered shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.data import shapes
from prompttune.data.base import ImageSource, Parts
from prompttune.errors import choose

DIGITS_TRAIN = 1000
SHAPES_TRAIN, SHAPES_VAL = 1000, 400


class ArraySource(ImageSource):
    """Images in memory."""

    def __init__(self, images: NDArray[np.uint8], labels: list[int], classes: list[str], name: str) -> None:
        self.images = images
        """uint8 [images, height, width, 3]."""
        self.classes = classes
        self.name = name
        self._labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`."""
        return Image.fromarray(self.images[index]), self._labels[index]

    def describe(self, index: int) -> str:
        """Name and index."""
        return f"{self.name}[{index}]"

    def labels(self) -> list[int]:
        """See :class:`ImageSource`."""
        return list(self._labels)


@dataclass(frozen=True)
class ShapeTask:
    """A task about rendered shapes."""

    scene: Callable[[int, shapes.Dice], shapes.Scene]
    classes: tuple[str, ...]


SHAPE_TASKS = {
    "location": ShapeTask(shapes.location, tuple(str(number) for number in range(shapes.BINS))),
    "orientation": ShapeTask(shapes.orientation, tuple(str(number) for number in range(shapes.BINS))),
    "count": ShapeTask(shapes.count, tuple(str(number + 1) for number in range(shapes.MOST))),
}


class ShapeSource(ImageSource):
    """One split of a shape task; an image is rendered at its first use, then kept."""

    def __init__(self, task: str, split: str, size: int) -> None:
        self.task = task
        self.split = split
        self.classes = list(SHAPE_TASKS[task].classes)
        self._size = size
        self._rendered: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return self._size

    def scene(self, index: int) -> shapes.Scene:
        """Content of the image at ``index``; raises :class:`IndexError` past the end."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        return SHAPE_TASKS[self.task].scene(index, shapes.Dice(f"{self.task}/{self.split}/{index}"))

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`; 64 x 64 pixels."""
        if index not in self._rendered:
            self._rendered[index] = self.scene(index).render()
        return Image.fromarray(self._rendered[index]), self._label(index)

    def _label(self, index: int) -> int:
        return index % len(self.classes)

    def describe(self, index: int) -> str:
        """Name, split and index."""
        return f"demo/{self.task}/{self.split}[{index}]"

    def labels(self) -> list[int]:
        """See :class:`ImageSource`."""
        return [self._label(index) for index in range(self._size)]


def _load_digits() -> Parts:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / digits.images.max())).astype(np.uint8)  # [1797, 8, 8]
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = digits.target.tolist()
    classes = [str(name) for name in digits.target_names]
    parts = train_test_split(range(len(labels)), train_size=DIGITS_TRAIN, stratify=labels, random_state=0)
    train, val = (
        ArraySource(images[sorted(part)], [labels[index] for index in sorted(part)], classes, f"demo/digits/{split}")
        for split, part in zip(("train", "val"), parts, strict=True)
    )
    return Parts({"train": train, "val": val}, "demo/digits")


def _load_shapes(task: str) -> Parts:
    sizes = {"train": SHAPES_TRAIN, "val": SHAPES_VAL}
    return Parts({split: ShapeSource(task, split, size) for split, size in sizes.items()}, f"demo/{task}")


def load_builtin(name: str) -> Parts:
    """Load ``digits``, ``location``, ``orientation`` or ``count``.

    Images and splits are always the same, whatever the seed and the validation fraction of a run, so that results are
    comparable. Of scikit-learn's 1,797 digits (8 x 8 pixels), 1,000 train, stratified. Each shape task (64 x 64 pixels)
    has 1,000 training and 400 validation images, whose classes take turns.

    Raises:
        UsageError: the name is unknown.
    """
    if choose("demo data set", name, ["digits", *SHAPE_TASKS]) == "digits":
        return _load_digits()
    return _load_shapes(name)
