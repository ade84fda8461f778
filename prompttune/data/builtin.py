"""Data sets that need no download: handwritten digits, and rendered shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.data import shape_masks, shapes
from prompttune.data.base import ImageSource, LabelledSource, Parts, Target
from prompttune.errors import choose

DIGITS_TRAIN = 1000
SHAPES = {"train": 1000, "val": 400}
MASKS = {"train": 600, "val": 200}

Rendered = tuple[NDArray[np.uint8], Any]
"""Pixels [height, width, 3] and a target."""


class ArraySource(LabelledSource):
    """Images in memory: uint8 [images, height, width, 3]."""

    def __init__(self, images: NDArray[np.uint8], labels: Sequence[int], classes: Sequence[str], name: str) -> None:
        super().__init__(labels, classes, name)
        self.images = images

    def image(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        return Image.fromarray(self.images[index])


class RenderedSource(ImageSource):
    """One split of rendered shapes, 64 x 64 pixels; an image is rendered at its first use, then kept.

    Args:
        name: name of the split, such as ``demo/count/train``.
        size: number of images.
        classes: class names by index.
        render: makes the image at an index.
        labels: class index of every image; None for masks.
    """

    def __init__(
        self,
        name: str,
        size: int,
        classes: Sequence[str],
        render: Callable[[int], Rendered],
        labels: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.classes = list(classes)
        self._size = size
        self._render = render
        self._labels = labels
        self._rendered: dict[int, Rendered] = {}

    def __len__(self) -> int:
        return self._size

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """See :class:`ImageSource`; raises :class:`IndexError` past the end."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        if index not in self._rendered:
            self._rendered[index] = self._render(index)
        pixels, target = self._rendered[index]
        return Image.fromarray(pixels), target

    def describe(self, index: int) -> str:
        """Name and index."""
        return f"{self.name}[{index}]"

    def labels(self) -> list[int] | None:
        """See :class:`ImageSource`."""
        return None if self._labels is None else list(self._labels)


def scene_of(task: str, split: str, index: int) -> shapes.Scene:
    """The content of an image of a shape task."""
    return SCENES[task][0](index, shapes.Dice(f"{task}/{split}/{index}"))


_BINS = [str(number) for number in range(shapes.BINS)]
SCENES: dict[str, tuple[Callable[[int, shapes.Dice], shapes.Scene], list[str]]] = {
    "location": (shapes.location, _BINS),
    "orientation": (shapes.orientation, _BINS),
    "count": (shapes.count, [str(number + 1) for number in range(shapes.MOST)]),
}
"""The scene of an image and the classes of each shape task."""


def _render_scene(task: str, split: str, index: int) -> Rendered:
    scene = scene_of(task, split, index)
    return scene.render(), scene.label


def _load_digits() -> dict[str, ImageSource]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / digits.images.max())).astype(np.uint8)  # [1797, 8, 8]
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = digits.target.tolist()
    classes = [str(name) for name in digits.target_names]
    parts = train_test_split(range(len(labels)), train_size=DIGITS_TRAIN, stratify=labels, random_state=0)
    named: dict[str, ImageSource] = {}
    for split, part in zip(("train", "val"), map(sorted, parts), strict=True):
        named[split] = ArraySource(images[part], [labels[index] for index in part], classes, f"demo/digits/{split}")
    return named


def _load_shapes(task: str) -> dict[str, ImageSource]:
    classes = SCENES[task][1]
    return {
        split: RenderedSource(
            f"demo/{task}/{split}",
            size,
            classes,
            partial(_render_scene, task, split),
            [index % len(classes) for index in range(size)],
        )
        for split, size in SHAPES.items()
    }


def _load_masks() -> dict[str, ImageSource]:
    return {
        split: RenderedSource(
            f"demo/{shape_masks.NAME}/{split}", size, shape_masks.CLASSES, partial(shape_masks.render, split)
        )
        for split, size in MASKS.items()
    }


def load_builtin(name: str, root: str | None = None) -> Parts:  # noqa: ARG001  # they are made, not read
    """Load ``digits``, ``location``, ``orientation``, ``count`` or ``shapes-seg``.

    Images and splits are always the same, whatever the seed and the validation fraction of a run, so that results are
    comparable. Of scikit-learn's 1,797 digits (8 x 8 pixels), 1,000 train, stratified. Each shape task (64 x 64 pixels)
    has 1,000 training and 400 validation images, whose classes take turns. ``shapes-seg`` has 600 training and 200
    validation images with masks.

    Raises:
        UsageError: the name is unknown.
    """
    target: Target = "class"
    if choose("demo data set", name, ["digits", *SCENES, shape_masks.NAME]) == "digits":
        named = _load_digits()
    elif name == shape_masks.NAME:
        named, target = _load_masks(), "mask"
    else:
        named = _load_shapes(name)
    return Parts(named, f"demo/{name}", target=target)
